"""What has to be equal on all ranks, as numbers that are cheap to compare."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import Plan
from adamezo_kernels.staging import blocks_of

from ..engine.optimizer import ZerothOrder

_OWN = ("params", "param_names", "fused")
"""What ranks may differ in: ``fused`` chooses among kernels with the same bits."""

_MULTIPLIER = 6364136223846793005  # Knuth's, for 64-bit linear congruential generators


State = list[list[tuple[str, Any]]]


def state_of(optimizer: ZerothOrder) -> State:
    """Options and history of each group, with all that decides where a step goes."""
    return [
        [("method", type(optimizer).__name__)]
        + [(name, _comparable(value)) for name, value in sorted(group.items()) if name not in _OWN]
        for group in optimizer.param_groups
    ]


def _comparable(value: Any) -> Any:
    """The same for what a state from JSON has in another type."""
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def token_of(state: State) -> int:
    """32 bits of :func:`state_of`, which float64 holds exactly."""
    return zlib.crc32(repr(state).encode())


def first_difference(states: Sequence[State], names: Sequence[int]) -> str:
    """In words, what the first rank and another differ in."""
    first = states[0]
    for state, rank in zip(states[1:], names[1:], strict=True):
        if len(state) != len(first):
            return f"rank {rank} has {len(state)} parameter groups, rank {names[0]} {len(first)}"
        for i, (here, there) in enumerate(zip(state, first, strict=True)):
            a, b = dict(here), dict(there)
            for name in sorted(a.keys() | b.keys()):
                if repr(a.get(name)) != repr(b.get(name)):
                    return (
                        f"rank {rank} has {name} {a.get(name)!r} in group {i}, rank {names[0]} has "
                        f"{b.get(name)!r}"
                    )
    return "nothing that can be named"


def checksum(plans: Sequence[Plan]) -> tuple[int, int]:
    """(layout, sum): two ranks with the same layout, which hold the same elements of the same
    parameters, must have the same sum. Each is 63 bits.

    The sum is of all elements' bits, each times an odd number of its own, modulo 2**64: a single
    element that differs always shows, and of others one in 2**63 does not.
    """
    segments = [segment for plan in plans for segment in plan]
    layout = repr([(s.parameter, s.elements, s.index_offset, s.rows, s.index_stride, s.tensor.dtype)
                   for s in segments])  # fmt: skip
    total = 0
    for device in sorted({s.tensor.device for s in segments}, key=str):
        on_it = [s for s in segments if s.tensor.device == device]
        sums = [_sum_of(t) for s in on_it for t in (s.tensor, *s.buffers)]
        for value in torch.stack(sums).tolist():  # one wait for all
            total = (total * _MULTIPLIER + value) % 2**64
    text = layout.encode()
    return zlib.crc32(text) << 31 | zlib.crc32(text[::-1]) >> 1, total >> 1


def _sum_of(tensor: Tensor) -> Tensor:
    bits = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    first = 0
    for block in blocks_of(tensor.detach()):
        values = block.reshape(-1).view(bits).long()
        places = torch.arange(first, first + len(values), dtype=torch.int64, device=tensor.device)
        total += (values * (2 * places + 1)).sum()  # torch's int64 wraps around
        first += len(values)
    return total


def odd_ones(values: Iterable[Hashable], names: Sequence[int]) -> list[int]:
    """The ranks whose value is not the one that most have; of equally many, not the first one's."""
    values = list(values)
    usual = Counter(values).most_common(1)[0][0]
    return [rank for rank, value in zip(names, values, strict=True) if value != usual]
