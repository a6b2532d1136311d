"""Full directions: y = x (W + c Z)^T, with Z made a few rows of W at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adamezo_kernels import Direction, Plan
from adamezo_kernels.backends import Backend
from adamezo_kernels.pieces import Pieces

from .blocks import Blocks, refused, uneven
from .vectors import Stacked

if TYPE_CHECKING:
    from .matrices import StandIn

PIECE = 2**19
"""How many weights are displaced at a time, if a row has no more: 2 MiB in float32, so that they
are still in a cache when the product reads them. A quarter of it made products of many rows of x
take twice as long, as each is then a small one."""

PIECE_ON_A_DEVICE = 2**22
"""The same on a GPU, where a piece is one launch of each of three kernels."""


class Full:
    """Computes with displaced pieces of a matrix, W + c Z, of which one exists at a time.

    The pieces have the bits that perturbation out of place gives them, up to the last one, and its
    roundings to 16 bits. A product has the same terms in another order.

    Args:
        plans: the weights.
        distribution, backend: see :func:`adamezo_kernels.sample_`.
    """

    def __init__(self, plans: Sequence[Plan], distribution: str, backend: Backend) -> None:
        self.vectors = distribution
        segments = [segment for plan in plans for segment in plan]
        self._pieces = {
            i: Pieces(segment, distribution, backend)
            for i, segment in enumerate(segments)
            if segment.columns > 0 and segment.tensor.numel()
        }
        self._longest = max((max(p.rows, p.columns) for p in self._pieces.values()), default=0)
        self._largest = max((p.rows * p.columns for p in self._pieces.values()), default=0)
        self._memory: dict[tuple[torch.device, torch.dtype | None], Tensor] = {}

    def begin(self, directions: Sequence[Direction]) -> None:
        """Directions are made when they are used."""

    def forget(self) -> None:
        """Nothing is kept from a direction."""

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes for memory in self._memory.values())

    def product(
        self, function: Any, x: Tensor, matrix: StandIn, compute: Callable[..., Tensor],
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        count = matrix.blocks.count
        if count == 1:
            return self._by_rows(x[None], matrix, compute, bias, -1)[0]
        rows = x.numel() // x.shape[-1]
        if rows % count or x.dim() == 1:
            refused(matrix.blocks, matrix.label, function, uneven(rows, matrix.blocks))
        y = self._by_rows(x.reshape(count, -1, x.shape[-1]), matrix, compute, bias, -1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def convolution(
        self, x: Tensor, matrix: StandIn, compute: Callable[..., Tensor], bias: Tensor | None
    ) -> Tensor:
        xs = x.unflatten(0, (matrix.blocks.count, -1))
        return self._by_rows(xs, matrix, compute, bias, 1).flatten(0, 1)

    def embedding(self, ids: Tensor, matrix: StandIn, shared: bool) -> Tensor:
        blocks, raw, n = matrix.blocks, matrix.raw, matrix.raw.shape[1]
        flat = ids.flatten()[None].expand(blocks.count, -1) if shared else ids
        of_block = flat.reshape(blocks.count, -1)
        y = raw.new_empty(*of_block.shape, n)
        pieces = self._pieces[matrix.place]
        fill = pieces.these_columns if matrix.turned else pieces.these_rows
        for direction, some in _by_direction(blocks):
            read, which = of_block[[k for k, _ in some]].unique(return_inverse=True)
            z = _float32((len(read), n), raw.device)
            fill(direction, read.tolist(), z)
            for (k, scale), places in zip(some, which, strict=True):
                torch.add(F.embedding(of_block[k], raw), z[places], alpha=scale, out=y[k])
        blocks.types.add(y.dtype)
        return y.view(*([blocks.count] if shared else []), *ids.shape, n)

    def whole(self, matrix: StandIn) -> Tensor:
        blocks, raw = matrix.blocks, matrix.raw
        untransposed = raw.t() if matrix.turned else raw
        moved = raw.new_empty(blocks.count, *untransposed.shape)
        z = _float32(untransposed.shape, raw.device)
        pieces = self._pieces[matrix.place]
        for direction, some in _by_direction(blocks):
            pieces.some_rows(direction, 0, z.view(pieces.rows, pieces.columns))
            for k, scale in some:
                torch.add(untransposed, z, alpha=scale, out=moved[k])
        return moved.transpose(1, 2) if matrix.turned else moved

    def _by_rows(
        self, xs: Tensor, matrix: StandIn, compute: Callable[..., Tensor], bias: Tensor | None,
        dim: int,
    ) -> Tensor:  # fmt: skip
        """``compute(x, W', bias')`` for each block's x and displaced W, by rows of it, of which
        results have an element each in their dimension ``dim``. Of shape (blocks, ...)."""
        blocks, raw = matrix.blocks, matrix.raw
        rows, results = raw.shape[0], None
        for start, stop in self._split(matrix):
            for direction, some in _by_direction(blocks):
                z = self.sampled(matrix, direction, start, stop)
                for k, scale in some:
                    piece = self._piece(raw, start, stop)
                    torch.add(raw[start:stop], z, alpha=scale, out=piece)
                    own = bias.stack[k] if isinstance(bias, Stacked) else bias
                    of_rows = None if own is None else own[start:stop]
                    y = compute(xs[k], piece, of_rows)
                    if results is None:
                        shape = [len(xs), *y.shape]
                        shape[dim % y.dim() + 1] = rows
                        results = y.new_empty(shape)
                    results[k].narrow(dim, start, stop - start).copy_(y)
        assert results is not None, "a matrix has rows"
        blocks.types.add(results.dtype)
        return results

    def _split(self, matrix: StandIn) -> Iterator[tuple[int, int]]:
        rows = matrix.raw.shape[0]
        size = PIECE if matrix.raw.is_cpu else PIECE_ON_A_DEVICE
        step = max(1, size // (matrix.raw.numel() // rows))
        if matrix.turned and step > 128:
            step -= step % 128  # columns that begin at a whole call of the generator
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def sampled(self, matrix: StandIn, direction: Direction, start: int, stop: int) -> Tensor:
        """Z of these rows of a matrix or of its transpose, in the shape of the weight's."""
        raw, pieces = matrix.raw, self._pieces[matrix.place]
        z = self._borrowed(raw.device, None)
        if matrix.turned:
            z = z[: raw.shape[1] * (stop - start)].view(raw.shape[1], stop - start)
            pieces.some_columns(direction, start, z, again=True)
            return z.t()
        z = z[: (stop - start) * pieces.columns].view(stop - start, pieces.columns)
        pieces.some_rows(direction, start, z, again=True)
        return z.view(stop - start, *raw.shape[1:])

    def _piece(self, raw: Tensor, start: int, stop: int) -> Tensor:
        """Memory for displaced rows, in the order that the weight has."""
        like = raw[start:stop]
        memory = self._borrowed(raw.device, raw.dtype)[: like.numel()]
        if raw.dim() == 2 and raw.stride(0) == 1 and raw.stride(1) != 1:
            return memory.view(like.shape[1], like.shape[0]).t()
        return memory.view(like.shape)

    def _borrowed(self, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Memory for the largest piece: of directions, or with a type of displaced weights."""
        memory = self._memory.get((device, dtype))
        if memory is None:
            size = PIECE if device.type == "cpu" else PIECE_ON_A_DEVICE
            size = max(min(size, self._largest), self._longest)
            with torch.inference_mode(False), torch.no_grad():
                memory = torch.empty(size, dtype=dtype or torch.float32, device=device)
            self._memory[device, dtype] = memory
        return memory


def _by_direction(blocks: Blocks) -> Iterator[tuple[Direction, list[tuple[int, float]]]]:
    """Each direction, and the blocks that have it with their scales."""
    scales = blocks.scales.tolist()
    for i, direction in enumerate(blocks.directions):
        yield direction, [(k, scales[k]) for k, of in enumerate(blocks.which) if of == i]


def _float32(shape: Sequence[int], device: torch.device) -> Tensor:
    """New memory of the ordinary kind, whatever the mode of the closure."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(shape, dtype=torch.float32, device=device)
