"""The numbers of an operation that may change from step to step, in the form that kernels read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .float32 import FLOAT32_MAX
from .rules import RULES
from .stream import PhiloxState, check_state

OPERATIONS = ("sample", "perturb", "update", "moment")
"""The operations of a backend. The index of a name is its number in csrc/adamezo/job.h."""

RULE_NUMBERS = 8
"""The capacity for a rule's numbers: kRuleNumbers of csrc/adamezo/buffered.h."""

_LEAST_NORMAL = 2.0**-126


class Terms:
    """Directions, their coefficients and the step size, as one int32 tensor ``words``.

    With H directions, of which the first is the newest::

        words = [counter of z_k] * H, [first_k] * H, [second_k] * H, -lr, 1 - lr * weight_decay

    followed by RULE_NUMBERS numbers of the rule, if that is not "moments".

    A counter is the 32 bits of an unsigned integer, every other word those of a float32. The tensor
    is on the host, and is copied for each call that runs on another device, or carried by its
    launches; or it is on the weights' device, where a kernel reads it when it runs and not when it
    is queued. So a step captured in a CUDA graph sees the values that were written since through
    the views below.

    Args:
        key, offset: see :class:`PhiloxState`; the same for all directions.
        horizon: the number of directions.
        with_second: whether there are coefficients for S2; otherwise v = 1.
        rule: one of RULES; it determines the horizon unless it is "moments".
        device: the device of new words, which are zeros.
        words: existing words, whose directions were checked before.
    """

    def __init__(
        self,
        key: int,
        offset: int = 0,
        horizon: int = 1,
        *,
        with_second: bool = False,
        rule: str = "moments",
        device: torch.device | str = "cpu",
        words: Tensor | None = None,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if rule != "moments" and (horizon != RULES[rule].directions or with_second):
            raise ValueError(
                f"the rule {rule!r} has {RULES[rule].directions} direction(s) and no second "
                f"coefficients, got {horizon} direction(s)"
            )
        self.rule = rule
        self.key = key
        self.offset = offset
        self.horizon = horizon
        self.with_second = with_second
        if words is None:
            check_state(PhiloxState(key, 0, offset))
            words = torch.zeros(_length(horizon, rule), dtype=torch.int32, device=device)
        self.words = words

    @classmethod
    def of(
        cls,
        states: Sequence[PhiloxState],
        first: Sequence[float] | None = None,
        second: Sequence[float] | None = None,
        **more: Any,
    ) -> Terms:
        """Terms of some directions on the host; ``more`` is as for :meth:`of_counters`.

        Raises:
            ValueError: ``states`` is empty, or its members do not share key and offset.
        """
        if not states:
            raise ValueError("got no states, expected at least one direction")
        key, _, offset = states[0]
        for state in states:
            check_state(state)
            if state.key != key or state.offset != offset:
                raise ValueError("the states of one call must share key and offset")
        counters = [state.counter for state in states]
        return cls.of_counters(key, counters, first, second, offset=offset, **more)

    @classmethod
    def of_counters(
        cls,
        key: int,
        counters: Sequence[int],
        first: Sequence[float] | None = None,
        second: Sequence[float] | None = None,
        *,
        offset: int = 0,
        minus_lr: float = 0.0,
        decay: float = 1.0,
        rule: str = "moments",
        numbers: Sequence[float] = (),
    ) -> Terms:
        """Terms on the host of the directions with these indices. Numbers are rounded to float32
        once, here.

        ``numbers`` may be only the first few of the rule's: the others are zeros.

        Raises:
            ValueError: an index does not fit 32 bits, or a number is not finite or beyond float32.
        """
        horizon = len(counters)
        if rule in RULES and len(numbers) > len(RULES[rule].numbers):
            raise ValueError(
                f"got {len(numbers)} numbers for the rule {rule!r}, which has "
                f"{len(RULES[rule].numbers)}: {', '.join(RULES[rule].numbers)}"
            )
        zeros = [0.0] * horizon
        own = [*numbers, *[0.0] * (_length(horizon, rule) - 3 * horizon - 2 - len(numbers))]
        numbers = [*(first or zeros), *(second or zeros), minus_lr, decay, *own]
        if not sum(map(abs, numbers)) <= FLOAT32_MAX:  # otherwise none exceeds it
            wrong = [number for number in numbers if not abs(number) <= FLOAT32_MAX]
            if wrong:
                raise ValueError(f"got a number that is not finite or beyond float32: {wrong[0]}")
        try:
            packed = struct.pack(f"={horizon}I{len(numbers)}f", *counters, *numbers)
        except struct.error:
            raise ValueError(
                f"the indices of directions must be integers of 32 bits, got {list(counters)}"
            ) from None
        words = torch.frombuffer(bytearray(packed), dtype=torch.int32)
        if min(map(abs, filter(None, numbers)), default=1.0) < _LEAST_NORMAL:
            for i, number in enumerate(numbers):
                if 0 < abs(number) < _LEAST_NORMAL:
                    words[horizon + i] = _subnormal_bits(number)
        squares = second is not None
        return cls(key, offset, horizon, with_second=squares, rule=rule, words=words)

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
        return self.words[3 * self.horizon : 3 * self.horizon + 2].view(torch.float32)

    @cached_property
    def numbers(self) -> Tensor:
        """float32 of shape (RULE_NUMBERS,): the rule's numbers; empty with "moments"."""
        return self.words[3 * self.horizon + 2 :].view(torch.float32)

    @cached_property
    def newest(self) -> Terms:
        """Terms of the first direction alone, over the same words."""
        if self.horizon == 1 and not self.with_second and self.rule == "moments":
            return self
        return Terms(self.key, self.offset, words=self.words)

    @classmethod
    def blend(cls, a: Direction, of_a: float, b: Direction, of_b: float) -> Terms | None:
        """``of_a z_a + of_b z_b`` as a direction; None where one has a rule already."""
        if isinstance(a, PhiloxState) and isinstance(b, PhiloxState):
            return cls.of([a, b], rule="blend", numbers=[of_a, of_b])
        if not isinstance(a, Terms) or not isinstance(b, Terms) or {a.rule, b.rule} != {"moments"}:
            return None
        terms = cls(a.key, a.offset, 2, rule="blend", device=a.words.device)
        terms.counters[0].copy_(a.counters[0])
        terms.counters[1].copy_(b.counters[0])
        terms.numbers[0].fill_(of_a)
        terms.numbers[1].fill_(of_b)
        return terms

    def states(self) -> list[PhiloxState]:
        """The directions, read from the words."""
        return [
            PhiloxState(self.key, counter & 0xFFFFFFFF, self.offset)
            for counter in self.counters.tolist()
        ]


Direction = PhiloxState | Terms
"""A direction z: its place in the stream, or the first of some terms, read when a kernel runs.
Terms whose rule has a direction of its own stand for that one."""


def _length(horizon: int, rule: str) -> int:
    """The number of words."""
    return 3 * horizon + 2 + (0 if rule == "moments" else RULE_NUMBERS)


def _subnormal_bits(number: float) -> int:
    """The float32 nearest to a number below 2**-126, without float32 arithmetic: a process that
    flushes subnormals to zero would flush this one."""
    bits = round(abs(number) * 2.0**149)
    return bits - 2**31 if number < 0 else bits
