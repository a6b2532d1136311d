"""Which weights the parameter groups have: a plan for each group."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adamezo_kernels import Plan
from adamezo_kernels.plan import memory_of

Groups = Sequence[dict[str, Any]]

BuffersOf = Callable[[Tensor, dict[str, Any]], Sequence[Tensor]]
"""Of a weight in a parameter group."""


class Layout:
    """Plans that are made again when a parameter has been replaced, moved or frozen."""

    def __init__(self) -> None:
        self._made: tuple[Any, list[Plan]] | None = None
        self.trains = False
        """Whether the plans have any elements."""

    def plans(self, groups: Groups, buffers_of: BuffersOf) -> list[Plan]:
        """One for each group, with the buffers of its weights.

        Raises:
            ValueError: a weight has another shape than it had the last time.
        """
        layout = [
            # Frozen ones may be of a kind that has no address, such as sparse.
            [(id(p), p.requires_grad and memory_of(p)) for p in params]
            for params in (group["params"] for group in groups)
        ]
        if self._made is None or self._made[0] != layout or not self._keeps(groups, buffers_of):
            if self._made is not None:
                _check_sizes(self._made[0], layout, groups)
            self._made = layout, _make_plans(groups, buffers_of)
            self.trains = any(plan.elements for plan in self._made[1])
        return self._made[1]

    def _keeps(self, groups: Groups, buffers_of: BuffersOf) -> bool:
        """Whether the buffers are those of the plans: somebody may have put others in the state."""
        assert self._made is not None
        return all(
            len(segment.buffers) == len(now) and all(map(operator.is_, segment.buffers, now))
            for plan, group in zip(self._made[1], groups, strict=True)
            if plan.buffers
            for segment in plan
            for now in (buffers_of(segment.tensor, group),)
        )


def _check_sizes(before: Any, now: Any, groups: Groups) -> None:
    """Along the directions kept, a weight of another shape would move as if at random."""
    for old, new, group in zip(before, now, groups, strict=False):  # groups may have been added
        for i, ((_, was), (_, is_now)) in enumerate(zip(old, new, strict=False)):
            if was and is_now and was[2] != is_now[2]:
                names = group.get("param_names")
                raise ValueError(
                    f"{names[i] if names else f'parameter {i} of its group'} has shape "
                    f"{tuple(is_now[2])} and had {tuple(was[2])} at the last step: the "
                    "history is of the weights as they were. Give it its shape back, or make a new "
                    "optimizer"
                )


def _make_plans(groups: Groups, buffers_of: BuffersOf) -> list[Plan]:
    """Trainable parameters of each group. A parameter's index counts all of them, frozen ones too,
    so that freezing one does not change the others' directions."""
    members: list[tuple[list[Tensor], list[int], list[str]]] = []
    seen = set()
    index = 0
    for group in groups:
        tensors, parameters, names = [], [], []
        given = group.get("param_names")
        for i, p in enumerate(group["params"]):
            # Two Parameters over the same memory are one weight, and must move once.
            if p.requires_grad and (p.numel() == 0 or memory_of(p) not in seen):
                seen.add(memory_of(p))
                tensors.append(p)
                parameters.append(index)
                names.append(given[i] if given else f"parameter {index}")
            index += 1
        members.append((tensors, parameters, names))
    plans = [
        Plan(tensors, parameters=parameters, names=names).with_buffers(
            [buffers_of(p, group) for p in tensors]
        )
        for group, (tensors, parameters, names) in zip(groups, members, strict=True)
    ]
    if len(plans) > 1:  # also across groups no two may share memory
        tensors, parameters, names = (sum(lists, []) for lists in zip(*members, strict=True))
        Plan(tensors, parameters=parameters, names=names)
    return plans
