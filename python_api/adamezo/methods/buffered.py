"""Base of methods that keep one or two numbers for each weight, beside its one update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import RULES, Direction, PhiloxState, Terms

from ..engine.arithmetic import Number
from ..engine.device import DeviceGroup, DeviceRule
from ..engine.sharded import filled_like
from .common import Method, directions_from

BUFFER_DTYPES = ("float32", "bfloat16")
"""Types that hold squares of gradients: of the three of the kernels, float16 does not."""


class Buffered(Method):
    """Base of methods whose update is one of the kernels' rules (:data:`adamezo_kernels.RULES`).

    A method names its rule and its buffers, and computes the rule's own numbers
    (:meth:`_numbers`), in one text for floats and for tensors on a device (arithmetic.py). Buffers
    are tensors shaped like their weight in ``state``; the first step makes them, and they are saved
    and loaded with ``state_dict``.

    Args:
        params: as for :class:`AdaMeZO`.
        own: the method's own options and their values, ``lr`` and ``zo_eps`` among them.
        common: those of COMMON that are to have another value, and ``buffer_dtype``: the type of
            the buffers, "float32" unless said, or "bfloat16", rounded as ``rounding`` says.
    """

    buffers: ClassVar[dict[str, float]]
    """Their names, in the order of the rule, with their first values."""

    def __init__(self, params: ParamsT, own: dict[str, Any], common: dict[str, Any]) -> None:
        own["buffer_dtype"] = common.pop("buffer_dtype", "float32")
        super().__init__(params, own, common)

    @staticmethod
    @abstractmethod
    def _numbers(
        p: Number, others: Sequence[Number], counter: Number, schedule: dict[str, Number],
        group: dict[str, Any],
    ) -> Sequence[Number]:  # fmt: skip
        """The rule's own numbers at an update.

        Args:
            p: the projected gradient, negated where the group maximizes.
            others: the other measured numbers.
            counter: the number of the step's first direction.
            schedule: the numbers of :meth:`_scheduled` at this step.
            group: its options.
        """

    def _direction_numbers(self, first: PhiloxState, options: dict[str, Any]) -> Sequence[float]:
        """The rule's numbers that its direction needs: the first few of them, or none."""
        return ()

    def _direction(self, z: PhiloxState, options: dict[str, Any]) -> Direction:
        rule = RULES[self.rule]
        if not rule.has_direction:
            return z
        states = directions_from(z, rule.directions)
        return Terms.of(states, rule=self.rule, numbers=self._direction_numbers(z, options))

    def _buffers_of(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        state = self.state[p]
        for name, start in self.buffers.items():
            if name not in state:
                dtype = getattr(torch, group["buffer_dtype"])
                state[name] = filled_like(p, start, dtype)
        return tuple(state[name] for name in self.buffers)

    def _terms(
        self, group: dict[str, Any], first: PhiloxState, measured: tuple[float, ...]
    ) -> tuple[Terms, dict[str, Any]]:
        sign = -1 if group["maximize"] else 1
        scheduled: dict[str, Number] = {**self._scheduled(group["steps"] + 1, group)}
        lr = float(group["lr"])
        terms = Terms.of_counters(
            first.key,
            range(first.counter, first.counter + RULES[self.rule].directions),
            minus_lr=-lr,
            decay=1 - lr * group["weight_decay"],
            rule=self.rule,
            numbers=self._numbers(
                sign * measured[0], measured[1:], first.counter, scheduled, group
            ),
        )
        return terms, {}

    def _device_group(
        self, group: dict[str, Any], directions: int, device: torch.device
    ) -> DeviceGroup:
        return DeviceRule(
            group,
            Terms(group["seed"], horizon=directions, rule=self.rule, device=device),
            self._numbers,
            self._schedule(group),
        )

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        if options["buffer_dtype"] not in BUFFER_DTYPES:
            raise ValueError(
                f"Invalid buffer_dtype: {options['buffer_dtype']!r}, expected one of "
                f"{BUFFER_DTYPES}"
            )

    _loading: list[tuple[Tensor, dict[str, Tensor]]] | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that buffers keep their type, which torch would make the weights'.

        Raises:
            ValueError: also where a buffer is missing or has another shape than its weight.
        """

        def look(_: Any, state_dict: dict[str, Any]) -> None:
            self._loading = self._checked_buffers(state_dict)

        last = self.register_load_state_dict_pre_hook(look)  # others may change the state before it
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._loading = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for p, buffers in self._loading or ():
            self.state[p] = {name: b.to(p.device, copy=True) for name, b in buffers.items()}

    def _checked_buffers(
        self, state_dict: dict[str, Any]
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The buffers of each weight that has some, under the names of :attr:`buffers`."""
        saved, groups = state_dict["state"], state_dict["param_groups"]
        found, stepped = [], False
        for group, mine in zip(groups, self.param_groups, strict=False):
            pairs = list(zip(group["params"], mine["params"], strict=False))
            for number, p in pairs:
                if number in saved:
                    _check_buffers(self.buffers, saved[number], p, f"parameter {number}")
                    found.append((p, {name: saved[number][name] for name in self.buffers}))
            stepped = stepped or (
                group.get("steps", 0) > 0 and any(p.requires_grad for _, p in pairs)
            )
        # A group may have none rightly: of weights that were frozen, or that another group has too.
        if stepped and not found:
            raise ValueError(
                f"the state has taken steps and has no {' or '.join(self.buffers)} of any weight: "
                "it was not saved whole"
            )
        return found


def _check_buffers(names: Iterable[str], saved: dict[str, Any], p: Tensor, where: str) -> None:
    for name in names:
        buffer = saved.get(name)
        kind = str(getattr(buffer, "dtype", None)).removeprefix("torch.")
        if not isinstance(buffer, Tensor) or kind not in BUFFER_DTYPES:
            raise ValueError(
                f"the state of {where} has {name} {type(buffer).__name__} of dtype {kind}, "
                f"expected a tensor of one of {', '.join(BUFFER_DTYPES)}"
            )
        if buffer.shape != p.shape:
            raise ValueError(
                f"the state of {where} has {name} of shape {tuple(buffer.shape)}, its weight has "
                f"{tuple(p.shape)}"
            )
