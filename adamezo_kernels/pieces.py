"""A few rows or columns of a matrix's direction at a time, for forwards that add it to a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .backends import Backend, choose
from .call import Call
from .plan import Plan, Segment, Shard
from .terms import Direction, Terms


class Pieces:
    """Samples pieces of the direction of one whole parameter, seen as a matrix: a row for each
    index of its first dimension. Each element has the bits that it has in the whole.

    Args:
        segment: of the parameter, which is no shard and has two or more dimensions.
        distribution, backend: see :func:`adamezo_kernels.sample_`.
    """

    def __init__(
        self, segment: Segment, distribution: str, backend: str | Backend | None = None
    ) -> None:
        self.columns = segment.columns
        self.rows = segment.tensor.numel() // segment.columns
        self._parameter = segment.parameter
        self._distribution = distribution
        self._backend = backend
        self._calls: dict[tuple[int, int, bool, int], Call] = {}

    def some_rows(
        self, direction: Direction, start: int, out: Tensor, *, again: bool = False
    ) -> None:
        """Fills ``out``, contiguous and of shape (rows, columns of the whole), with the rows from
        ``start`` on. With ``again``, for memory that the caller uses for that piece many times: it
        is kept, and what was checked."""
        self._fill(direction, start, out, False, again)

    def some_columns(
        self, direction: Direction, start: int, out: Tensor, *, again: bool = False
    ) -> None:
        """Fills ``out``, contiguous and of shape (rows of the whole, columns), with the columns
        from ``start`` on, as :meth:`some_rows` does."""
        self._fill(direction, start, out, True, again)

    def these_rows(self, direction: Direction, rows: Sequence[int], out: Tensor) -> None:
        """Fills ``out``, contiguous and of shape (len(rows), columns of the whole)."""
        n = self.columns
        self._fill_these(direction, out, [(n * row, 1, n) for row in rows], n)

    def these_columns(self, direction: Direction, columns: Sequence[int], out: Tensor) -> None:
        """Fills ``out``, contiguous and of shape (len(columns), rows of the whole)."""
        m, n = self.rows, self.columns
        self._fill_these(direction, out, [(column, m, 1) for column in columns], m, n)

    def _fill(
        self, direction: Direction, start: int, out: Tensor, by_columns: bool, again: bool
    ) -> None:
        size = out.shape[1 if by_columns else 0]
        key = start, size, by_columns, out.data_ptr()
        call = self._calls.get(key)
        if call is None:
            _check(out, (self.rows, size) if by_columns else (size, self.columns))
            shard = (
                Shard(start, self.rows, self.columns, self.columns)
                if by_columns
                else Shard(start * self.columns, columns=self.columns)
            )
            plan = Plan([out], parameters=[self._parameter], shards=[shard], names=["out"])
            call = Call("sample", plan, _first(direction), self._distribution)
            if again:
                self._calls[key] = call
        self._run(call.vary(terms=_first(direction)))

    def _fill_these(
        self, direction: Direction, out: Tensor, places: Sequence[tuple[int, int, int]],
        length: int, stride: int = 0,
    ) -> None:  # fmt: skip
        """Fills each row of ``out``: (index of its first element, rows, row length)."""
        _check(out, (len(places), length))
        (like,) = plan = Plan([out], parameters=[self._parameter])
        plan.names = ["out"] * len(places)
        segments = [
            replace(
                like,
                tensor=one,
                source=one,
                rows=rows,
                row_length=row_length,
                row_stride=row_length,
                source_stride=row_length,
                index_offset=index,
                index_stride=stride,
                columns=self.columns,
            )
            for (index, rows, row_length), one in zip(places, out.detach().unbind(0), strict=True)
        ]
        self._run(Call("sample", plan._of(segments), _first(direction), self._distribution))

    def _run(self, call: Call) -> None:
        choose(call.plan.devices, self._backend, self._distribution).run(call)


def _first(direction: Direction) -> Terms:
    terms = direction if isinstance(direction, Terms) else Terms.of([direction])
    return terms.newest


def _check(out: Tensor, shape: tuple[int, int]) -> None:
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor of shape {shape}, got shape {tuple(out.shape)} and "
            f"strides {out.stride()}"
        )
