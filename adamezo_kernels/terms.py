"""The numbers of an operation that may change from step to step, in the form that kernels read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .stream import PhiloxState, check_state

OPERATIONS = ("sample", "perturb", "update", "moment")
"""What a backend does with terms. Their place here is their number in csrc/adamezo/job.h."""

_LEAST_NORMAL = 2.0**-126


class Terms:
    """Directions, their coefficients and the step size, as one int32 tensor ``words``.

    With H directions, of which the first is the newest::

        words = [counter of z_k] * H, [first_k] * H, [second_k] * H, -lr, 1 - lr * weight_decay

    Counters are the 32 bits of an unsigned integer, all others those of a float32. The tensor is on
    the host, and is copied for each call that runs elsewhere; or on the weights' device, where a
    kernel reads it when it runs and not when it is queued. So a step that was captured in a CUDA
    graph sees what was written there since, through the views below.

    Args:
        key, offset: see :class:`PhiloxState`; the same for all directions.
        horizon: how many directions.
        with_second: whether there are coefficients for S2; else v = 1.
        device: where the words are; zeros at first.
    """

    def __init__(
        self,
        key: int,
        offset: int = 0,
        horizon: int = 1,
        *,
        with_second: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        check_state(PhiloxState(key, 0, offset))
        self.key = key
        self.offset = offset
        self.horizon = horizon
        self.with_second = with_second
        self.words = torch.zeros(3 * horizon + 2, dtype=torch.int32, device=device)

    @classmethod
    def of(
        cls,
        states: Sequence[PhiloxState],
        first: Sequence[float] | None = None,
        second: Sequence[float] | None = None,
        *,
        minus_lr: float = 0.0,
        decay: float = 1.0,
    ) -> Terms:
        """Numbers on the host, rounded to float32 here and once."""
        horizon = len(states)
        for state in states:
            check_state(state)
        terms = cls(states[0].key, states[0].offset, horizon, with_second=second is not None)
        zeros = [0.0] * horizon
        numbers = [*(first or zeros), *(second or zeros), minus_lr, decay]
        counters = [state.counter for state in states]
        packed = struct.pack(f"={horizon}I{len(numbers)}f", *counters, *numbers)
        terms.words = torch.frombuffer(bytearray(packed), dtype=torch.int32)
        for i, number in enumerate(numbers):
            if 0 < abs(number) < _LEAST_NORMAL:
                terms.words[horizon + i] = _subnormal_bits(number)
        return terms

    @cached_property
    def counters(self) -> Tensor:
        """int32 of shape (horizon,)."""
        return self.words[: self.horizon]

    @cached_property
    def first(self) -> Tensor:
        """float32 of shape (horizon,)."""
        return self.words[self.horizon : 2 * self.horizon].view(torch.float32)

    @cached_property
    def second(self) -> Tensor:
        """float32 of shape (horizon,)."""
        return self.words[2 * self.horizon : 3 * self.horizon].view(torch.float32)

    @cached_property
    def step(self) -> Tensor:
        """float32 of shape (2,): -lr and 1 - lr * weight_decay."""
        return self.words[3 * self.horizon :].view(torch.float32)

    @cached_property
    def newest(self) -> Terms:
        """The first direction alone, from the same words."""
        if self.horizon == 1 and not self.with_second:
            return self
        terms = Terms(self.key, self.offset)
        terms.words = self.words
        return terms

    def states(self) -> list[PhiloxState]:
        """The directions, read from the words."""
        return [
            PhiloxState(self.key, counter & 0xFFFFFFFF, self.offset)
            for counter in self.counters.tolist()
        ]


Direction = PhiloxState | Terms
"""z: by its place in the stream, or as the first of some terms, read when a kernel runs."""


def _subnormal_bits(number: float) -> int:
    """The float32 nearest to a number below 2**-126, without float32 arithmetic: a process that
    flushes subnormals to zero would flush this one."""
    bits = round(abs(number) * 2.0**149)
    return bits - 2**31 if number < 0 else bits
