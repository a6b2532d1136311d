"""The factors of low-rank and flipout directions as tensors, for forwards that use them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import Backend, choose
from .call import Call
from .plan import Plan, Segment
from .rules import RULES
from .stream import kind_of
from .terms import Direction, Terms

# The purposes of csrc/adamezo/philox.h; a parameter's number has 24 bits.
_PURPOSES = {"lowrank": (4 << 24, 5 << 24), "flipout": (6 << 24, 7 << 24)}
_LOG_TERM = 34  # a factor's element q << 34 is the first one of term q


class Factor(NamedTuple):
    """The direction of one tensor: ``u.T @ v``, of ``flipout`` times its normals; or the vector
    ``u`` where ``v`` is None."""

    u: Tensor
    """float32 of shape (rank, rows); of a tensor of fewer than two dimensions its shape."""
    v: Tensor | None
    """float32 of shape (rank, columns)."""


class Factors:
    """Memory for the factors of a ``lowrank`` direction of all tensors of some plans, or for the
    signs of a ``flipout`` direction.

    Args:
        plans: whole parameters, not shards.
        distribution: ``"lowrank"`` or ``"lowrank:R"``, ``"flipout"`` or ``"flipout:N"``.
        backend: as in :func:`adamezo_kernels.sample_`, or None. It samples exact normals, which
            every backend has.

    Attributes:
        of: a Factor for each tensor, in the order of the plans; :meth:`fill` writes them.
    """

    def __init__(
        self, plans: list[Plan], distribution: str, backend: str | Backend | None = None
    ) -> None:
        name, rank = kind_of(distribution)
        if name not in _PURPOSES:
            raise ValueError(f"expected a lowrank or flipout distribution, got {distribution!r}")
        self._purposes = _PURPOSES[name]
        rank = 1 if name == "flipout" else rank
        segments = [segment for plan in plans for segment in plan]
        self._backend = backend
        self._calls: list[Call] = []
        self._scale = float(torch.tensor(1.0 / math.sqrt(rank), dtype=torch.float64).float())
        self._of_rows: list[Tensor] = []
        self._signs: list[Tensor] | None = [] if name == "flipout" else None
        self.of: list[Factor] = []
        with torch.inference_mode(False), torch.no_grad():
            by_device: dict[torch.device, list[Segment]] = {}
            for segment in segments:
                rows = by_device.setdefault(segment.tensor.device, [])
                self.of.append(self._made(segment, rank, rows))
            template = Plan([])
            self._plans = [template._of(rows) for rows in by_device.values()]

    def _made(self, segment: Segment, rank: int, rows: list[Segment]) -> Factor:
        """The factor of one tensor, and the segments that sample it."""
        tensor, columns = segment.tensor, segment.columns

        def memory(count: int, of: int) -> Tensor:
            return torch.empty(count, of, dtype=torch.float32, device=tensor.device)

        def add(out: Tensor, purpose: int) -> None:
            (made,) = Plan([out.view(-1)])
            rows.append(
                replace(
                    made,
                    tensor=out,
                    source=out,
                    parameter=segment.parameter | purpose,
                    rows=out.shape[0],
                    row_length=out.shape[1],
                    row_stride=out.shape[1],
                    source_stride=out.shape[1],
                    index_stride=1 << _LOG_TERM,
                )
            )

        if columns == 0:
            out = memory(1, tensor.numel())
            add(out, 0)
            return Factor(out.view(tensor.shape), None)
        u, v = memory(rank, tensor.numel() // columns), memory(rank, columns)
        for factor, purpose in zip((u, v), self._purposes, strict=True):
            add(factor, purpose)
            if self._signs is not None:
                self._signs.append(factor)
        if rank > 1:
            self._of_rows.append(u)
        return Factor(u, v)

    @property
    def bytes(self) -> int:
        """The memory of all factors."""
        return sum(t.nbytes for factor in self.of for t in factor if t is not None)

    def fill(self, direction: Direction) -> None:
        """Writes the factors of a direction, of whose Terms it takes the first."""
        terms = direction if isinstance(direction, Terms) else Terms.of([direction])
        if RULES[terms.rule].has_direction or terms.offset:
            raise ValueError(
                "expected a direction without offset and of no rule, got offset "
                f"{terms.offset} and rule {terms.rule!r}"
            )
        for plan in self._plans:
            call = Call("sample", plan, terms.newest, "exact")
            choose(plan.devices, self._backend, "exact").run(call)
        for u in self._of_rows:
            u.mul_(self._scale)
        for factor in self._signs or ():  # of a zero with its sign
            torch.copysign(torch.ones_like(factor), factor, out=factor)
