"""Perturbation of pieces of weights, beside a copy from which they are restored bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from adamezo_kernels import Call, Direction, Plan, Terms, run
from adamezo_kernels.backends import Backend


class Saved:
    """``perturbation="out_of_place"`` of DTensors, which modules gather from where they are.

    Each perturbation is computed from a copy of what this rank holds and written into the weights,
    and the copy is written back before the update. So weights and losses have the bits that they
    have where modules read perturbed copies, and the memory is one more copy of this rank's pieces.

    Args:
        plans: the weights of each parameter group.
        distribution, backend: see :func:`adamezo_kernels.perturb_`.
        forget: called when weights have changed, to forget what was computed from them.
    """

    perturbations = 0
    broken = False

    def __init__(
        self,
        plans: Sequence[Plan],
        distribution: str,
        backend: Backend,
        forget: Callable[[], None],
    ) -> None:
        self._made_of = plans
        self._distribution = distribution
        self._backend = backend
        self._forget = forget
        self._tensors = [[segment.tensor for segment in plan] for plan in plans]
        self._copies = [[torch.empty_like(t) for t in tensors] for tensors in self._tensors]
        self._plans: list[Plan] = []
        for plan, tensors, copies in zip(plans, self._tensors, self._copies, strict=True):
            buffers = [segment.buffers for segment in plan]
            self._plans.append(plan.like(copies).with_buffers(buffers).into(tensors))
        self._changed = [False] * len(plans)

    def are_of(self, plans: Sequence[Plan], distribution: str, backend: Backend) -> bool:
        """Whether weights and directions are still the same."""
        same = self._distribution == distribution and self._backend is backend
        return self._made_of is plans and same

    @property
    def scratch_bytes(self) -> int:
        """The memory of the copies."""
        return sum(copy.nbytes for copies in self._copies for copy in copies)

    def save(self) -> None:
        """A step begins: copies the weights as they are."""
        for tensors, copies in zip(self._tensors, self._copies, strict=True):
            for tensor, copy in zip(tensors, copies, strict=True):
                copy.copy_(tensor)
        self._changed = [False] * len(self._plans)

    def perturb(self, direction: Direction, scale: float) -> None:
        terms = direction if isinstance(direction, Terms) else Terms.of([direction])
        for i, plan in enumerate(self._plans):
            self._changed[i] = True
            call = Call("perturb", plan, terms, self._distribution, "nearest", scale)
            run(call, self._backend)
        self._forget()

    def evaluation(self) -> AbstractContextManager[None]:
        return nullcontext()

    def restoring(self, group: int) -> float:
        self._put_back(group)  # an update adds no direction then
        return -0.0

    def restored(self, group: int) -> None:
        pass

    def restore(self) -> None:
        for group in range(len(self._plans)):
            self._put_back(group)
        self._forget()

    def _put_back(self, group: int) -> None:
        if self._changed[group]:
            for tensor, copy in zip(self._tensors[group], self._copies[group], strict=True):
                tensor.detach().copy_(copy)
            self._changed[group] = False
