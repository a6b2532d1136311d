"""Directions that share their normals U: y = x W^T + c ((x * s) U^T) * r, with signs r and s of
each perturbation (flipout, arXiv 1803.04386)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adamezo_kernels import Direction, PhiloxState, Plan, Terms, kind_of
from adamezo_kernels.backends import Backend

from .blocks import refused, uneven
from .full import Full
from .low_rank import KeptFactors, without_autocast
from .vectors import Stacked, with_bias

if TYPE_CHECKING:
    from .matrices import StandIn


class Flipout(Full):
    """Products of all perturbations with one U, of which a few rows exist at a time. All other
    functions compute with displaced pieces, as of any directions.

    Args:
        plans: the weights.
        distribution: ``"flipout"`` or ``"flipout:N"``.
        backend: see :func:`adamezo_kernels.sample_`.
    """

    def __init__(self, plans: Sequence[Plan], distribution: str, backend: Backend) -> None:
        super().__init__(plans, distribution, backend)
        self.vectors = "exact"  # the same bits, which every backend has
        self._group = kind_of(distribution)[1]
        self._normals = Full(plans, "exact", backend)
        self._signs = KeptFactors(plans, distribution, backend)

    def begin(self, directions: Sequence[Direction]) -> None:
        for direction in directions:
            if isinstance(direction, Terms) and not direction.words.is_cpu:
                raise ValueError(
                    "capturable=True with distribution='flipout' and perturbation='regenerated': "
                    "which directions share their normals has to be known on the host. Take "
                    "perturbation='out_of_place', or leave out capturable"
                )
        self._signs.begin(directions)

    def forget(self) -> None:
        self._signs.forget()

    @property
    def bytes(self) -> int:
        return super().bytes + self._normals.bytes + self._signs.bytes

    def product(
        self, function: Any, x: Tensor, matrix: StandIn, compute: Callable[..., Tensor],
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        blocks, raw, n = matrix.blocks, matrix.raw, x.shape[-1]
        rows = x.numel() // n
        if rows % blocks.count or (x.dim() == 1 and blocks.count > 1):
            refused(blocks, matrix.label, function, uneven(rows, blocks))
        y = compute(x, raw, None if isinstance(bias, Stacked) else bias)
        blocks.types.add(y.dtype)
        with without_autocast(y):
            r, s = (factor.expand(blocks.count, -1, -1) for factor in self._signs.of(matrix))
            flipped = x.float().reshape(blocks.count, -1, n) * s
            scaled = r * blocks.scales.to(r.device).view(-1, 1, 1)
            sums = y.float().contiguous()  # y itself, as a rule: nobody else has it
            by_block = sums.view(blocks.count, -1, raw.shape[0])
            for base, some in self._by_normals(blocks.directions, blocks.which):
                whole = len(some) == blocks.count
                xs = flipped if whole else flipped[some]
                for start, stop in self._split(matrix):
                    u = self._normals.sampled(matrix, base, start, stop)
                    part = (xs @ u.t()) * scaled[some, :, start:stop]
                    if whole:
                        by_block[:, :, start:stop] += part
                    else:
                        by_block[some, :, start:stop] += part
            y = sums.to(y.dtype)
        return with_bias(y, bias, -1) if isinstance(bias, Stacked) else y

    def _by_normals(
        self, directions: Sequence[Terms], which: Sequence[int]
    ) -> list[tuple[Terms, list[int]]]:
        """The directions whose normals are shared, and the blocks that have these."""
        states = [terms.states()[0] for terms in directions]
        found: dict[PhiloxState, list[int]] = {}
        for k, i in enumerate(which):
            base = states[i]._replace(counter=states[i].counter // self._group)
            found.setdefault(base, []).append(k)
        return [(Terms.of([base]), some) for base, some in found.items()]
