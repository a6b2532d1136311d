"""The trainable weights of all parameter groups: a plan for each group, made when it is needed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from adamezo_kernels import Plan, Shard
from adamezo_kernels.plan import memories_of, memory_of

from .sharded import local, shard_of

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
        owners (list[list[Tensor]]): for each plan, the parameters whose elements its tensors are.
        tensors (list[Tensor]): the weights of all plans, in their order: of a DTensor what this
            rank holds.
        sharded (bool): whether there are DTensors among the parameters.
        names (list[str]): the names of the tensors, for messages.
        memories (list): where the tensors are in memory.
        devices (frozenset[torch.device]): where the tensors are.
        trains (bool): whether there are any elements, here or on other ranks.
    """

    def __init__(self, groups: Groups, buffers_of: BuffersOf) -> None:
        self._params = [list(group["params"]) for group in groups]
        self._trained = [[p.requires_grad for p in params] for params in self._params]
        self._shapes = [[p.requires_grad and p.shape for p in params] for params in self._params]
        self.plans, self.owners = _make_plans(groups, buffers_of)
        owners = [p for own in self.owners for p in own]
        self.tensors = [segment.tensor for plan in self.plans for segment in plan]
        self.names = [name for plan in self.plans for name in plan.names]
        self.trains = any(p.numel() for p in owners)
        self._pieces = [(p, t) for p, t in zip(owners, self.tensors, strict=True) if p is not t]
        self.sharded = bool(self._pieces)
        self.devices = frozenset(p.device for p in self.tensors)
        self.memories = memories_of(self.tensors)
        self._counting = [not p.is_inference() for p in self.tensors]
        self._all_count = all(self._counting)
        # Two Parameters over the same memory are one weight, until one of them is moved.
        ours = set(map(id, owners))
        trained = (p for params in self._params for p in params if p.requires_grad)
        self._aliases = [local(p) for p in trained if id(p) not in ours]
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
            all(local(p) is tensor for p, tensor in self._pieces)
            and memories_of(self.tensors) == self.memories
            and memories_of(self._aliases) == self._alias_memories
            and self._have_buffers(groups, buffers_of)
        )

    def _have_buffers(self, groups: Groups, buffers_of: BuffersOf) -> bool:
        """Whether the plans have today's buffers: somebody may have put others in the state."""
        return all(
            len(segment.buffers) == len(now)
            and all(map(operator.is_, segment.buffers, map(local, now)))
            for plan, own, group in zip(self.plans, self.owners, groups, strict=True)
            if plan.buffers
            for segment, p in zip(plan, own, strict=True)
            for now in (buffers_of(p, group),)
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


def _make_plans(groups: Groups, buffers_of: BuffersOf) -> tuple[list[Plan], list[list[Tensor]]]:
    """A plan of the trainable parameters of each group, and those parameters. A parameter's index
    counts frozen ones too, so that freezing one does not change the directions of the others."""
    members: list[_Member] = []
    seen = set()
    index = 0
    for k, group in enumerate(groups):
        given = group.get("param_names")
        for i, p in enumerate(group["params"]):
            if p.requires_grad:
                tensor, name = local(p), given[i] if given else f"parameter {index}"
                # Two Parameters over the same memory are one weight, and must move once.
                memory = memory_of(tensor)
                if tensor.numel() == 0 or memory not in seen:
                    seen.add(memory)
                    members.append(_Member(k, p, tensor, index, shard_of(p, name), name))
            index += 1
    own = [[m for m in members if m.group == k] for k in range(len(groups))]
    plans = [
        _plan(some).with_buffers([tuple(map(local, buffers_of(m.parameter, group))) for m in some])
        for group, some in zip(groups, own, strict=True)
    ]
    if len(plans) > 1:  # also across groups no two may share memory
        _plan(members)
    return plans, [[m.parameter for m in some] for some in own]


class _Member(NamedTuple):
    """A weight of a plan."""

    group: int
    parameter: Tensor
    tensor: Tensor
    number: int
    shard: Shard | None
    name: str


def _plan(members: Sequence[_Member]) -> Plan:
    return Plan(
        [m.tensor for m in members],
        parameters=[m.number for m in members],
        shards=[m.shard for m in members],
        names=[m.name for m in members],
    )
