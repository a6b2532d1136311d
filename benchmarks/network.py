"""What do latency and lost packets cost a step of several hosts?

    sudo python -m benchmarks.network    six minutes; Linux, root and /dev/net/tun

Each rank has a network namespace of its own, as a host has. Their packets go through this process,
which holds each for a given time and drops some, so that TCP sees a slow and lossy link. Gloo and
the step are as they are (benchmarks/scaling.py): "exchange" is what a step does for the losses of
all ranks. Its 99 % quantile shows what a lost packet costs, which is rare. Writes
benchmarks/results/network.csv.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import numpy
import torch
from torch import distributed

from benchmarks.results import Row, conditions, parser, settings, spread, write
from benchmarks.scaling import Found, steps

ELEMENTS = 2**12
"""So few that a step is its exchange."""
LINKS = ((0.0, 0.0), (0.001, 0.0), (0.01, 0.0), (0.05, 0.0), (0.001, 0.001), (0.01, 0.01))
"""(seconds of a packet on its way, share of packets that are lost)"""
WORLDS = (2, 4)

_DEVICE, _PORT = "wire", 29411
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LARGEST = 65536


def _address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def _host(number: int) -> Iterator[tuple[str, int]]:
    """A network namespace and the file that has the packets it sends, and takes those for it."""
    name = f"adamezo-{os.getpid()}-{number}"
    device = f"{_DEVICE}{os.getpid()}.{number}"[-15:]
    packets = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(packets, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("netns", "add", name)
    try:
        _ip("link", "set", device, "netns", name)
        inside = ("-n", name)
        _ip(*inside, "link", "set", device, "name", _DEVICE)
        _ip(*inside, "addr", "add", f"{_address(number)}/24", "dev", _DEVICE)
        _ip(*inside, "link", "set", _DEVICE, "up")
        _ip(*inside, "link", "set", "lo", "up")
        yield name, packets
    finally:
        os.close(packets)
        _ip("netns", "delete", name)


def _forward(packets: list[int], latency: float, loss: float) -> None:
    """Gives each packet to the host that it is for, ``latency`` seconds later, or to none."""
    rnd = random.Random(1)
    on_their_way: list[tuple[float, int, int, bytes]] = []
    poll, number = select.poll(), 0
    for file in packets:
        poll.register(file, select.POLLIN)
    while True:
        wait = None
        if on_their_way:
            wait = max(0.0, on_their_way[0][0] - time.perf_counter()) * 1000
        for file, _ in poll.poll(wait):
            packet = os.read(file, _LARGEST)
            version, host = packet[0] >> 4, packet[19] - 1
            if version == 4 and host < len(packets) and rnd.random() >= loss:
                number += 1
                due = time.perf_counter() + latency
                heapq.heappush(on_their_way, (due, number, packets[host], packet))
        while on_their_way and on_their_way[0][0] <= time.perf_counter():
            _, _, to, packet = heapq.heappop(on_their_way)
            os.write(to, packet)


@contextmanager
def _hosts(count: int, latency: float, loss: float) -> Iterator[list[str]]:
    """The namespaces of so many hosts, joined by links of this kind."""
    with ExitStack() as stack:
        made = [stack.enter_context(_host(number)) for number in range(count)]
        child = os.fork()
        if child == 0:
            try:
                _forward([packets for _, packets in made], latency, loss)
            finally:
                os._exit(1)
        try:
            yield [name for name, _ in made]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def on_hosts(world: int, latency: float, loss: float, repeats: int) -> Found:
    """Seconds of steps and of their exchanges, on the first of so many hosts."""
    with _hosts(world, latency, loss) as names:
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.network",
                 "--rank", str(rank), "--world", str(world), "--repeats", str(repeats)],
                env=os.environ | {"GLOO_SOCKET_IFNAME": _DEVICE, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, text=True,
            )
            for rank, name in enumerate(names)
        ]  # fmt: skip
        said = [process.communicate(timeout=600)[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError("a rank has failed: see above")
        found: Found = json.loads(said[0].splitlines()[-1])
        return found


def _rank(rank: int, world: int, repeats: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://{_address(0)}:{_PORT}", rank=rank, world_size=world,
        timeout=timedelta(minutes=2),
    )  # fmt: skip
    print(json.dumps(steps(repeats, ELEMENTS)))
    distributed.destroy_process_group()


def rows(repeats: int, where: dict[str, Any]) -> Iterator[Row]:
    for latency, loss in LINKS:
        for world in WORLDS:
            found = on_hosts(world, latency, loss, repeats)
            columns = settings(elements=ELEMENTS, latency=latency, loss=loss)
            exchange = found["exchange"]
            rare = {"median": float(numpy.quantile(exchange, 0.99)), "repeats": len(exchange)}
            for metric, numbers in (
                *((metric, spread(seconds)) for metric, seconds in found.items()),
                ("exchange, 99 %", rare),
            ):
                name = ("network", metric, "s", "hosts", columns, "ranks", world)
                yield Row(*name, **numbers, **where)
            print(
                f"{world} hosts, {1e3 * latency:g} ms, {loss:.1%} lost: exchange "
                f"{1e3 * numpy.median(exchange):.2f} ms, 99 % {1e3 * rare['median']:.2f} ms",
                flush=True,
            )


def main() -> None:
    made = parser(__doc__, "network.csv")
    for name in ("rank", "world", "repeats"):  # of a host's process
        made.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.rank is not None:
        _rank(arguments.rank, arguments.world, arguments.repeats)
        return
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        raise SystemExit("network namespaces need root, and their links /dev/net/tun")
    write(arguments.output, rows(30 if arguments.quick else 300, conditions()))


if __name__ == "__main__":
    main()
