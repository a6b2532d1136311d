"""Low-rank directions: x (W + c u v^T)^T = x W^T + c (x v) u^T, two thin products more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adamezo_kernels import Direction, Plan
from adamezo_kernels.backends import Backend
from adamezo_kernels.factors import Factors

from .blocks import Blocks, refused, uneven
from .vectors import Stacked, with_bias

if TYPE_CHECKING:
    from .matrices import StandIn


class KeptFactors:
    """The factors of a step's directions.

    Args:
        plans, distribution, backend: see :class:`adamezo_kernels.factors.Factors`.
    """

    def __init__(self, plans: Sequence[Plan], distribution: str, backend: Backend) -> None:
        self._plans = plans
        self._distribution = distribution
        self._backend = backend
        self._made: list[tuple[Direction | None, Factors]] = []

    def begin(self, directions: Sequence[Direction]) -> None:
        """Makes the factors of each direction. Those of the last call are kept: a step looks at a
        direction from both sides."""
        while len(self._made) < len(directions):
            self._made.append((None, Factors([*self._plans], self._distribution, self._backend)))
        for i, direction in enumerate(directions):
            kept, factors = self._made[i]
            if kept is not direction:
                factors.fill(direction)
                self._made[i] = direction, factors

    def forget(self) -> None:
        self._made = [(None, factors) for _, factors in self._made]

    @property
    def bytes(self) -> int:
        return sum(factors.bytes for _, factors in self._made)

    def of(self, matrix: StandIn) -> tuple[Tensor, Tensor]:
        """u and v, of shape (blocks, rank, rows) and (blocks, rank, columns), or with 1 in place of
        the number of blocks where all have the same."""
        blocks = matrix.blocks
        found = [factors.of[matrix.place] for _, factors in self._made[: len(blocks.directions)]]
        if len(found) == 1:
            u, v = found[0].u[None], found[0].v[None]  # type: ignore[index]
        else:
            u = torch.stack([found[k].u for k in blocks.which])
            v = torch.stack([found[k].v for k in blocks.which])  # type: ignore[misc]
        return (v, u) if matrix.turned else (u, v)


class LowRank(KeptFactors):
    """Corrects what is computed from a matrix by the factors of the directions.

    Args:
        plans: the weights.
        distribution: ``"lowrank"`` or ``"lowrank:R"``.
        backend: see :func:`adamezo_kernels.sample_`.
    """

    vectors = "exact"

    def product(
        self, function: Any, x: Tensor, matrix: StandIn, compute: Callable[..., Tensor],
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y = compute(x, matrix.raw, None if isinstance(bias, Stacked) else bias)
        with without_autocast(y):
            u, v = self.of(matrix)
            y = _add(y, _times(x, v, matrix, function), u, matrix.blocks)
        return with_bias(y, bias, -1) if isinstance(bias, Stacked) else y

    def embedding(self, ids: Tensor, matrix: StandIn, shared: bool) -> Tensor:
        # The rows that are read are those of u: y + c u[ids] v
        blocks, count = matrix.blocks, matrix.blocks.count
        y = F.embedding(ids, matrix.raw)
        u, v = self.of(matrix)
        of_row = u.transpose(1, 2).expand(count, -1, -1)
        if shared:
            rows = torch.stack([F.embedding(ids.flatten(), of_row[k]) for k in range(count)])
            return _add(y.expand(count, *y.shape), rows, v, blocks)
        pieces = ids.reshape(count, -1)
        rows = torch.stack([F.embedding(pieces[k], of_row[k]) for k in range(count)])
        return _add(y, rows, v, blocks)

    def convolution(
        self, x: Tensor, matrix: StandIn, compute: Callable[..., Tensor], bias: Tensor | None
    ) -> Tensor:
        blocks = matrix.blocks
        y = compute(x, matrix.raw, None if isinstance(bias, Stacked) else bias)
        with without_autocast(y):
            u, v = self.of(matrix)
            # A convolution with v has a channel for each term, which u spreads over all channels.
            kernels = v.expand(blocks.count, -1, -1).unflatten(2, matrix.shape[1:])
            u = u.expand(blocks.count, -1, -1)
            pieces = x.float().unflatten(0, (blocks.count, -1))
            scales = blocks.scales.to(x.device)
            added = [
                scales[k] * torch.einsum("bq...,qm->bm...", compute(pieces[k], kernels[k]), u[k])
                for k in range(blocks.count)
            ]
            y = (y.float() + torch.cat(added)).to(y.dtype)
        return with_bias(y, bias, 1) if isinstance(bias, Stacked) else y

    def whole(self, matrix: StandIn) -> Tensor:
        u, v = self.of(matrix)
        z = torch.einsum("kqm,kqn->kmn", u, v)
        scales = matrix.blocks.scales.to(z.device).view(-1, 1, 1)
        weight = matrix.raw.float()
        flat = weight.reshape(weight.shape[0], -1)
        return (flat + scales * z).view(-1, *weight.shape).to(matrix.dtype)


def _add(y: Tensor, t: Tensor, u: Tensor, blocks: Blocks) -> Tensor:
    """``y + c t u`` for each block's c: t of shape (blocks, rows, rank), u of (blocks or 1, rank,
    n), and y with blocks * rows * n elements in their order."""
    blocks.types.add(y.dtype)
    t = t.float() * blocks.scales.to(t.device).view(-1, 1, 1)
    n = u.shape[2]
    result = y.float().contiguous()  # y itself, as a rule: nobody else has it
    if u.shape[0] == 1:
        result.view(-1, n).addmm_(t.view(-1, t.shape[2]), u[0])
    else:
        result.view(blocks.count, -1, n).baddbmm_(t, u)
    return result.to(y.dtype)


def _times(x: Tensor, v: Tensor, matrix: StandIn, function: Any) -> Tensor:
    """x v of each block, of shape (blocks, rows, rank)."""
    blocks = matrix.blocks
    flat = x.float().reshape(-1, x.shape[-1])
    if flat.shape[0] % blocks.count or (x.dim() == 1 and blocks.count > 1):
        refused(blocks, matrix.label, function, uneven(flat.shape[0], blocks))
    if v.shape[0] == 1:
        return (flat @ v[0].t()).view(blocks.count, -1, v.shape[1])
    return torch.bmm(flat.view(blocks.count, -1, x.shape[-1]), v.transpose(1, 2))


def without_autocast(tensor: Tensor) -> Any:
    """A context for float32 arithmetic. Entering autocast costs as much as a small product."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
