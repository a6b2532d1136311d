"""The hosts of benchmarks/network.py: real TCP between network namespaces, over links with latency
and loss."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def has_namespaces() -> bool:
    able = os.geteuid() == 0 and os.path.exists("/dev/net/tun") and shutil.which("ip")
    if not able:
        return False
    name = f"adamezo-test-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_namespaces(), reason="needs root, `ip` and /dev/net/tun"),
]


def test_an_exchange_takes_no_less_than_its_messages():
    from benchmarks.network import on_hosts

    found = on_hosts(2, 0.02, 0.0, 5)
    # A rank has the other's losses no sooner than a message can have come.
    assert min(found["exchange"]) >= 0.02
    assert len(found["step"]) == 5


def test_lost_packets_end_no_run():
    from benchmarks.network import on_hosts

    assert len(on_hosts(3, 0.0, 0.05, 20)["step"]) == 20
