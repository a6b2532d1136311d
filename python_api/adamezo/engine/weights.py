"""The trainable weights of all parameter groups: a plan for each group, made when it is needed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adamezo_kernels import Plan
from adamezo_kernels.plan import memories_of, memory_of

Groups = Sequence[dict[str, Any]]

BuffersOf = Callable[[Tensor, dict[str, Any]], Sequence[Tensor]]
"""Gives the buffers of a weight in a parameter group."""


class Weights:
    """All weights that a step moves, as they are in memory, and what can be told of them once.

    Args:
        groups: the parameter groups.
        buffers_of: gives the buffers of a weight.

    Attributes:
        plans (list[Plan]): one for each group.
        tensors (list[Tensor]): the weights of all plans, in their order.
        names (list[str]): the names of the tensors, for messages.
        memories (list): where the tensors are in memory.
        devices (frozenset[torch.device]): where the tensors are.
        trains (bool): whether the plans have any elements.
    """

    def __init__(self, groups: Groups, buffers_of: BuffersOf) -> None:
        self._params = [list(group["params"]) for group in groups]
        self._trained = [[p.requires_grad for p in params] for params in self._params]
        self._shapes = [[p.requires_grad and p.shape for p in params] for params in self._params]
        self.plans = _make_plans(groups, buffers_of)
        self.tensors = [segment.tensor for plan in self.plans for segment in plan]
        self.names = [name for plan in self.plans for name in plan.names]
        self.trains = any(plan.elements for plan in self.plans)
        self.devices = frozenset(p.device for p in self.tensors)
        self.memories = memories_of(self.tensors)
        self._counting = [not p.is_inference() for p in self.tensors]
        self._all_count = all(self._counting)
        # Two Parameters over the same memory are one weight, until one of them is moved.
        ours = set(map(id, self.tensors))
        trained = (p for params in self._params for p in params if p.requires_grad)
        self._aliases = [p for p in trained if id(p) not in ours]
        self._alias_memories = memories_of(self._aliases)

    def are_of(self, groups: Groups, buffers_of: BuffersOf) -> bool:
        """Whether parameters, their memory and their buffers are still those of the plans."""
        if len(groups) != len(self._params):
            return False
        for group, params, trained in zip(groups, self._params, self._trained, strict=True):
            now = group["params"]
            if len(now) != len(params) or not all(map(operator.is_, now, params)):
                return False
            if [p.requires_grad for p in params] != trained:
                return False
        return (
            memories_of(self.tensors) == self.memories
            and memories_of(self._aliases) == self._alias_memories
            and self._have_buffers(groups, buffers_of)
        )

    def _have_buffers(self, groups: Groups, buffers_of: BuffersOf) -> bool:
        """Whether the plans have today's buffers: somebody may have put others in the state."""
        return all(
            len(segment.buffers) == len(now) and all(map(operator.is_, segment.buffers, now))
            for plan, group in zip(self.plans, groups, strict=True)
            if plan.buffers
            for segment in plan
            for now in (buffers_of(segment.tensor, group),)
        )

    def check_shapes(self, groups: Groups) -> None:
        """Raises ValueError if a weight has got another shape: along the directions of the history
        it would move as if at random."""
        for shapes, group in zip(self._shapes, groups, strict=False):  # some may have been added
            for i, (before, p) in enumerate(zip(shapes, group["params"], strict=False)):
                if before is not False and p.requires_grad and p.shape != before:
                    names = group.get("param_names")
                    raise ValueError(
                        f"{names[i] if names else f'parameter {i} of its group'} has shape "
                        f"{tuple(p.shape)} and had {tuple(before)} at the last step: the history "
                        "is of the weights as they were. Give it its shape back, or make a new "
                        "optimizer"
                    )

    def versions(self) -> list[int]:
        """How often each weight was written, as torch counts it; inference tensors do not count."""
        if self._all_count:
            return [p._version for p in self.tensors]
        pairs = zip(self.tensors, self._counting, strict=True)
        return [p._version if counts else 0 for p, counts in pairs]


def _make_plans(groups: Groups, buffers_of: BuffersOf) -> list[Plan]:
    """A plan of the trainable parameters of each group. A parameter's index counts frozen ones too,
    so that freezing one does not change the directions of the others."""
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
