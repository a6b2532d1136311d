"""A run on the processes that torchrun or ``accelerate launch`` has started for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

_T = TypeVar("_T")
TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other: the first one may write a model meanwhile."""


def size() -> int:
    """How many processes take part, by what the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The place of this one among them. The first, 0, shows, logs and writes."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def device(name: str) -> torch.device:
    """A device by its name; with "auto" and "cuda" each process on a machine has one of its own.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: got {name!r}, expected auto, cpu, cuda or cuda:0") from None


@contextmanager
def joined(where: torch.device) -> Iterator[None]:
    """Has a process group inside, where there are several processes."""
    if size() == 1 or distributed.is_initialized():
        yield
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def of_the_first(make: Callable[[], _T]) -> _T:
    """What the first process makes, in all of them: another machine may round otherwise."""
    if size() == 1:
        return make()
    made: list[_T | None] = [make() if rank() == 0 else None]
    distributed.broadcast_object_list(made, src=0)
    (found,) = made
    return found  # type: ignore[return-value]
