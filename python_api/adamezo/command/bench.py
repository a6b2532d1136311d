"""``adamezo bench``: the two passes of a step on this machine, beside the same with torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import typer
from torch import Tensor

from adamezo_kernels import PhiloxState, Plan, Terms, perturb_, update_terms_
from adamezo_kernels.backends import choose

HORIZON = 10


def command(
    elements: Annotated[int, typer.Option(min=1000, help="weights of the tensor")] = 10_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="times of each, the fastest counts")] = 5,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
) -> int:
    """Time the passes over the weights that a step consists of, beside torch's own functions.

    A step perturbs twice and updates once; its forwards are the model's own. torch's way draws each
    direction with a generator of the same kind of seed, in place and in float32.
    """
    from rich.console import Console
    from rich.table import Table

    where = torch.device(device)
    threads = torch.get_num_threads()
    table = Table(title=f"{elements:,} weights on {where}, {threads} threads")
    table.add_column("pass")
    for name in ("ours, M weights/s", "torch, M weights/s", "ratio"):
        table.add_column(name, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        for name, ours, theirs in passes(elements, dtype, where):
            seconds = timed([ours, theirs], repeats, where)
            speed = [elements / s / 1e6 for s in seconds]
            ratio = f"{seconds[1] / seconds[0]:.1f}x"
            kind = str(dtype).removeprefix("torch.")
            table.add_row(f"{name}, {kind}", f"{speed[0]:,.0f}", f"{speed[1]:,.0f}", ratio)
    Console().print(table)
    backend = choose([where]).NAME
    print(f"ours: backend {backend}. Other work on this machine slows both, not always alike.")
    return 0


def passes(
    elements: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, Callable[[], None], Callable[[], None]]]:
    """Name, our way and torch's way of each pass. Both work on weights of their own."""
    mine, other = (torch.zeros(elements, dtype=dtype, device=device) for _ in range(2))
    plan = Plan([mine])
    states = [PhiloxState(1, HORIZON - i) for i in range(HORIZON)]
    first = [0.3 * 0.7**i for i in range(HORIZON)]
    second = [0.1 * 0.9**i for i in range(HORIZON)]
    terms = Terms.of(states, first, second, minus_lr=-1e-6, decay=1.0)
    z, m, v = (torch.empty(elements, device=device) for _ in range(3))

    def draw(seed: int) -> Tensor:
        return z.normal_(generator=torch.Generator(device).manual_seed(seed))

    def perturb() -> None:
        other.add_(draw(1).to(dtype), alpha=1e-3)

    def update() -> None:
        m.zero_()
        v.zero_()
        for seed, (a, b) in enumerate(zip(first, second, strict=True)):
            m.add_(draw(seed), alpha=a)
            v.addcmul_(z, z, value=b)
        other.sub_(m.div_(v.sqrt_().add_(1e-8)).mul_(1e-6).to(dtype))

    return [
        ("perturb", lambda: perturb_(plan, states[0], 1e-3), perturb),
        (f"update, horizon {HORIZON}", lambda: update_terms_(plan, terms), update),
    ]


def timed(
    functions: Sequence[Callable[[], None]], repeats: int, device: torch.device
) -> list[float]:
    """The fastest time of each in seconds, all in turn, after one that is not counted."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, found in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                found.append(time.perf_counter() - start)
    return [min(found) for found in seconds]
