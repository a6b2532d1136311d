"""A plan: many tensors as one table that a kernel walks in one call, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .staging import Batch, Staging
from .stream import LARGEST_FACTOR

ELEMENT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The element types of weights. The index of a type is its number in csrc/adamezo/rounding.h."""

MAX_PARAMETERS = 2**24
MAX_BUFFERS = 2
"""The largest number of buffers of a weight: kMaxBuffers of csrc/adamezo/buffered.h."""

_MAX_INDEX = 2**63


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """The properties that a plan depends on: equal for two tensors that are the same elements in
    memory, and different once a tensor was resized, moved or cast."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def memories_of(tensors: Iterable[Tensor]) -> list[tuple[object, ...]]:
    """The same for many tensors in less time, as a step calls it three times for all weights. The
    device is left out, since a tensor that moves to another gets another address."""
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]


class Shard(NamedTuple):
    """The place of a local tensor's elements in the whole, unsharded, row-major parameter.

    The local tensor, taken in row-major order, is ``rows`` rows of equal length. The first begins
    at element ``offset`` of the whole parameter, and each next one ``stride`` elements later. A
    tensor split along dimension 0 is one row; one split along dimension 1 has as many rows as its
    dimension 0, and ``stride`` is the unsharded row length.
    """

    offset: int = 0
    rows: int = 1
    stride: int = 0
    columns: int | None = None
    """The elements of the whole parameter for each index of its first dimension; 0 where it has
    one dimension. Only ``lowrank`` and ``flipout`` directions need it."""

    @classmethod
    def of_box(
        cls, shape: Sequence[int], start: Sequence[int], size: Sequence[int]
    ) -> Shard | None:
        """The place of a box: in each dimension, of length ``shape[d]``, the ``size[d]`` indices
        from ``start[d]`` on. None where its elements are not rows with one stride between them, as
        where two dimensions after the first are cut."""
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        found = _rows_in_memory(size, strides)
        if found is None:
            return None
        offset = sum(first * step for first, step in zip(start, strides, strict=True))
        rows, stride = found
        columns = strides[0] if len(shape) > 1 and 0 not in shape else 0
        return cls(offset, rows, stride if rows > 1 else 0, columns)


@dataclass(frozen=True)
class Segment:
    """One tensor as ``rows`` rows of ``row_length`` consecutive elements."""

    tensor: Tensor
    parameter: int
    """24-bit index of the parameter."""
    rows: int
    row_length: int
    row_stride: int
    """Elements in memory from one row to the next."""
    index_offset: int
    """Index of the first element in the whole parameter."""
    index_stride: int
    """Index distance from one row to the next."""
    source: Tensor
    """The tensor that is read: the one written, or another one (:meth:`Plan.into`)."""
    source_stride: int
    """Elements in memory from one row of the source to the next."""
    columns: int = 0
    """Elements of the whole parameter for each index of its first dimension; 0 where it has one
    dimension, -1 where its shard does not say."""
    buffers: tuple[Tensor, ...] = ()
    """The buffers of a rule, an element for each weight (:meth:`Plan.with_buffers`)."""
    staged: bool = False
    """Whether its elements, or those of its source, are not such rows in memory: the strides are
    then those of a contiguous copy, which the kernels walk (staging.py)."""

    @property
    def elements(self) -> int:
        return self.rows * self.row_length

    @property
    def last_index(self) -> int:
        """Index of the last element in the whole parameter; -1 without elements."""
        if not self.elements:
            return -1
        return self.index_offset + (self.rows - 1) * self.index_stride + self.row_length - 1


@dataclass(frozen=True)
class Launch:
    """The segments of one device and one element type, which one kernel call takes."""

    device: torch.device
    dtype: torch.dtype
    segments: tuple[Segment, ...]

    @cached_property
    def elements(self) -> int:
        return sum(segment.elements for segment in self.segments)

    @cached_property
    def kind(self) -> tuple[int, int, int, int]:
        """The arguments for the compiled module besides the table: the number of segments and of
        elements, and the numbers of the element types of weights and buffers."""
        types = ELEMENT_TYPES.index(self.dtype), ELEMENT_TYPES.index(self.buffer_dtype)
        return len(self.segments), self.elements, *types

    @cached_property
    def counted(self) -> list[Tensor]:
        """Weights and buffers whose versions autograd counts: all but inference tensors."""
        tensors = (t for s in self.segments for t in (s.tensor, *s.buffers))
        return [t for t in tensors if not t.is_inference()]

    @cached_property
    def buffer_dtype(self) -> torch.dtype:
        """The element type of all buffers; float32 where there are none."""
        dtypes = [buffer.dtype for segment in self.segments for buffer in segment.buffers]
        return dtypes[0] if dtypes else torch.float32

    @cached_property
    def last_index(self) -> int:
        """The largest index of an element in its whole parameter; -1 without elements."""
        return max(segment.last_index for segment in self.segments)

    def by_kernel(self, distribution: str) -> list[tuple[Launch, str]]:
        """The launches of kernels for a call along directions of a distribution, and the
        distribution of each: directions that belong to rows and columns have a kernel for matrices,
        and exact normals for vectors."""
        if not distribution.startswith(("lowrank", "flipout")):
            return [(self, distribution)]
        kinds = zip(self._matrices_and_vectors, (distribution, "exact"), strict=True)
        return [(part, kind) for part, kind in kinds if part.elements]

    @cached_property
    def _matrices_and_vectors(self) -> tuple[Launch, Launch]:
        """Its segments of parameters with two or more dimensions, and the others."""
        matrices = tuple(segment for segment in self.segments if segment.columns)
        vectors = tuple(segment for segment in self.segments if not segment.columns)
        return replace(self, segments=matrices), replace(self, segments=vectors)

    @cached_property
    def copies(self) -> dict[tuple[str, int, int], tuple[Tensor, int]]:
        """Copies of the table on a GPU and the number of what each counts: by what that is, the
        call's offset, and the handle of the stream that made and uses the copy."""
        return {}

    @cached_property
    def table(self) -> Tensor:
        """int64 of shape (segments, 13), on the host: the columns of csrc/adamezo/segment.h."""
        rows, first = [], 0
        for s in self.segments:
            addresses = (s.tensor.data_ptr(), s.source.data_ptr())
            layout = (s.rows, s.row_length, s.row_stride, s.source_stride)
            index = (s.index_offset, s.index_stride, s.parameter)
            buffers = [buffer.data_ptr() for buffer in s.buffers]
            buffers += [0] * (MAX_BUFFERS - len(buffers))
            rows.append((*addresses, *layout, *index, *buffers, first, s.columns))
            first += s.elements
        return torch.tensor(rows, dtype=torch.int64).view(-1, 11 + MAX_BUFFERS)


class Plan:
    """A table of tensors that an operation walks together.

    Args:
        tensors: float32, bfloat16 or float16 tensors of any shape, strides and alignment (also
            empty), on any devices, whose elements do not overlap in memory. An element's index is
            its place in row-major order, whatever the strides: a tensor has the bits of its
            contiguous copy. Kernels walk contiguous tensors where they are, and those that are
            rows of consecutive elements with one stride between rows, such as ``weight[:, 8:24]``.
            Others, such as ``weight.t()`` or one in ``torch.channels_last``, are *staged*: copied
            out, worked on and copied back, in blocks of at most 2**20 elements. That costs two
            copies, and memory for one block of each type, which the plan keeps.
        parameters: the index in [0, 2**24) that selects each tensor's random stream;
            ``range(len(tensors))`` if not given.
        shards: for each tensor that is a piece of a parameter, which piece; ``None`` for whole
            ones.
        names: the names of the tensors in messages.

    The plan keeps the tensors and their addresses. It is invalid after one of them was resized
    or moved: make a new one, which is cheap.

    Raises:
        TypeError, ValueError: a tensor that cannot be walked or written, or two that share memory;
            the message names it and says what to do.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        parameters: Sequence[int] | None = None,
        shards: Sequence[Shard | None] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        tensors = list(tensors)
        count = len(tensors)
        parameters = list(range(count) if parameters is None else parameters)
        shards = [None] * count if shards is None else list(shards)
        self.names = [f"tensor {i}" for i in range(count)] if names is None else list(names)
        for argument, values in (
            ("parameters", parameters),
            ("shards", shards),
            ("names", self.names),
        ):
            if len(values) != count:
                raise ValueError(f"got {len(values)} {argument} for {count} tensors")
        self.segments = tuple(
            _segment(tensor, parameter, shard, name)
            for tensor, parameter, shard, name in zip(
                tensors, parameters, shards, self.names, strict=True
            )
        )
        _check_disjoint(self.segments, self.names)
        self.staging = Staging()

    def like(self, tensors: Sequence[Tensor]) -> Plan:
        """A plan of the same elements of the same parameters, held in other tensors."""
        return Plan(
            tensors,
            parameters=[s.parameter for s in self.segments],
            shards=[
                Shard(s.index_offset, s.rows, s.index_stride, None if s.columns < 0 else s.columns)
                for s in self.segments
            ],
            names=self.names,
        )

    def into(self, tensors: Sequence[Tensor], *, staging: Staging | None = None) -> Plan:
        """A plan for :func:`adamezo_kernels.perturb_` alone, which reads these weights and writes
        other tensors.

        Args:
            tensors: one for each of the plan, of its shape, type and device, and with memory of
                its own.
            staging: memory for copies of staged tensors, to share it among plans that never run at
                the same time.
        """
        plan = self.like(tensors)
        if staging is not None:
            plan.staging = staging
        segments = []
        for source, target, name in zip(self.segments, plan.segments, self.names, strict=True):
            for what in ("shape", "dtype", "device"):
                expected, got = getattr(source.tensor, what), getattr(target.tensor, what)
                if got != expected:
                    raise ValueError(f"{name}: expected {what} {expected} to write to, got {got}")
            moved = replace(
                target,
                source=source.tensor,
                source_stride=source.row_stride,
                buffers=source.buffers,
            )
            # One kernel walks source and target by the same rows.
            if source.staged or source.rows != target.rows:
                moved = _staged(moved)
            segments.append(moved)
        _check_disjoint((*self.segments, *plan.segments), [*self.names, *self.names])
        return plan._of(segments)

    def with_buffers(self, buffers: Sequence[Sequence[Tensor]]) -> Plan:
        """A plan of the same weights with the buffers of a rule of :data:`adamezo_kernels.RULES`.

        Args:
            buffers: for each tensor of the plan as many as the rule has, contiguous and of its
                shape and device; float32, bfloat16 or float16, all of one type.
        """
        if len(buffers) != len(self.segments):
            raise ValueError(f"got buffers for {len(buffers)} of {len(self.segments)} tensors")
        pairs = list(zip(self.segments, self.names, buffers, strict=True))
        dtypes = {buffer.dtype for own in buffers for buffer in own}
        counts = {len(own) for own in buffers}
        if len(dtypes) > 1 or len(counts) > 1 or max(counts, default=0) > MAX_BUFFERS:
            raise ValueError(
                f"expected the same number of buffers for each tensor, {MAX_BUFFERS} at most, and "
                f"of one type; got {sorted(counts)} of {', '.join(sorted(map(str, dtypes)))}"
            )
        for segment, name, own in pairs:
            for i, buffer in enumerate(own):
                expected = segment.tensor.shape, segment.tensor.device, True
                got = buffer.shape, buffer.device, buffer.is_contiguous()
                if got != expected:
                    raise ValueError(
                        f"buffer {i} of {name} has shape {tuple(got[0])} on {got[1]}"
                        f"{'' if got[2] else ', not contiguous'}; expected a contiguous one of "
                        f"shape {tuple(expected[0])} on {expected[1]}"
                    )
        flat = [buffer for own in buffers for buffer in own]
        names = [f"buffer {i} of {name}" for _, name, own in pairs for i in range(len(own))]
        buffer_segments = Plan(flat, parameters=[0] * len(flat), names=names).segments
        _check_disjoint((*self.segments, *buffer_segments), [*self.names, *names])
        return self._of([replace(s, buffers=tuple(own)) for s, _, own in pairs])

    def _of(self, segments: Iterable[Segment]) -> Plan:
        """A plan with the same names and staging memory, and other segments."""
        plan = object.__new__(Plan)  # a copy would keep the cached properties
        plan.names, plan.staging, plan.segments = self.names, self.staging, tuple(segments)
        return plan

    @property
    def buffers(self) -> int:
        """The number of buffers of each weight."""
        return len(self.segments[0].buffers) if self.segments else 0

    @cached_property
    def in_place(self) -> bool:
        """Whether each tensor is read and written in place: all but the plans of :meth:`into`."""
        return all(segment.source is segment.tensor for segment in self.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def elements(self) -> int:
        return sum(segment.elements for segment in self.segments)

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        return frozenset(segment.tensor.device for segment in self.segments)

    @cached_property
    def last_index(self) -> int:
        """The largest index of an element in its whole parameter."""
        return max((segment.last_index for segment in self.segments), default=0)

    @cached_property
    def largest_matrix_offset(self) -> int:
        """The largest PhiloxState.offset with which no row number reaches LARGEST_FACTOR."""
        limits = (
            s.columns * LARGEST_FACTOR - 1 - s.last_index for s in self.segments if s.columns > 0
        )
        return min(limits, default=_MAX_INDEX)

    def check_matrices(self) -> None:
        """Raises ValueError where a tensor has no ``lowrank`` and ``flipout`` directions."""
        for segment, name in zip(self.segments, self.names, strict=True):
            if segment.columns < 0:
                raise ValueError(
                    f"{name} is a piece of a parameter of unknown shape, and low-rank and flipout "
                    "directions belong to its rows and columns: expected a Shard with `columns`"
                )
            if segment.columns > LARGEST_FACTOR:
                raise ValueError(
                    f"{name} has rows of {segment.columns:,} elements, and low-rank and flipout "
                    f"directions at most {LARGEST_FACTOR:,}: take another distribution"
                )

    @cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset(segment.tensor.dtype for segment in self.segments)

    @cached_property
    def staged(self) -> tuple[Segment, ...]:
        """The segments that kernels walk as copies (staging.py)."""
        return tuple(segment for segment in self.segments if segment.staged)

    @cached_property
    def batches(self) -> dict[object, list[Batch]]:
        """The batches of staged segments (staging.py), by the streams that they run on."""
        return {}

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        """The segments that kernels walk in their own memory, by device and element type: all but
        the staged ones."""
        walked = [segment for segment in self.segments if not segment.staged]

        def kind(segment: Segment) -> tuple[str, int]:
            return str(segment.tensor.device), ELEMENT_TYPES.index(segment.tensor.dtype)

        return tuple(
            Launch(members[0].tensor.device, members[0].tensor.dtype, members)
            for members in (
                tuple(group) for _, group in groupby(sorted(walked, key=kind), key=kind)
            )
        )


def _segment(tensor: Tensor, parameter: int, shard: Shard | None, name: str) -> Segment:
    _check_tensor(tensor, name)
    if shard is None:
        matrix = tensor.dim() > 1 and tensor.numel() > 0
        shard = Shard(columns=tensor.numel() // tensor.shape[0] if matrix else 0)
    if not isinstance(parameter, int) or not 0 <= parameter < MAX_PARAMETERS:
        raise ValueError(f"{name}: the parameter index must be in [0, 2**24), got {parameter!r}")
    elements = tensor.numel()
    least = min(shard.offset, shard.stride, shard.columns or 0)
    if shard.rows < 1 or elements % shard.rows or least < 0:
        raise ValueError(f"{name}: {elements} elements cannot be laid out as {shard}")
    if elements == 0:
        shard = Shard(columns=0)  # an empty shard's numbers may be beyond all limits
    found = _rows_in_memory(tensor.shape, tensor.stride())
    if found is None and _overlaps(tensor):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: its elements "
            "overlap in memory (as after `expand`). Pass a tensor with memory for each of them, "
            "such as its `contiguous()`"
        )
    rows, stride = found or (1, elements)
    if rows == 1:
        rows = shard.rows
        stride = elements // rows
    row_length = elements // rows
    segment = Segment(
        tensor=tensor,
        parameter=parameter,
        rows=rows,
        row_length=row_length,
        row_stride=stride,
        index_offset=shard.offset,
        index_stride=row_length if shard.rows == 1 else shard.stride,
        source=tensor,
        source_stride=stride,
        columns=-1 if shard.columns is None else shard.columns,
    )
    if shard.rows not in (1, rows):
        # The rows in memory are not those of the shard.
        rows, row_length = shard.rows, elements // shard.rows
        segment = _staged(replace(segment, rows=rows, row_length=row_length))
    elif found is None:
        segment = _staged(segment)
    if shard.rows > 1 and shard.stride < row_length:
        raise ValueError(
            f"{name}: rows of {row_length} elements overlap in the parameter, as {shard} sets "
            f"them {shard.stride} apart"
        )
    if segment.last_index >= _MAX_INDEX:
        raise ValueError(f"{name}: element indices reach {segment.last_index}, the limit is 2**63")
    return segment


def _staged(segment: Segment) -> Segment:
    length = segment.row_length
    return replace(segment, row_stride=length, source_stride=length, staged=True)


def _check_tensor(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which has no memory of its own: pass the plain "
            "tensor inside it (for a DTensor `to_local()`, with its Shard)"
        )
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor: pass the tensors inside it (`unbind()`)")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {tensor.layout}, expected a dense tensor: pass `to_dense()`"
        )
    if tensor.is_meta:
        raise TypeError(f"{name} is on the meta device and has no memory: materialize it first")
    if tensor.is_quantized or tensor.dtype not in ELEMENT_TYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected torch.float32, torch.bfloat16 or "
            "torch.float16: convert it, or leave it out"
        )
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"{name} has no memory: its storage was freed, as sharding libraries do")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazily negated view: pass `resolve_neg()`")
    if tensor.requires_grad and not tensor.is_leaf:
        raise ValueError(
            f"{name} requires grad and is the result of an operation: changing it in place would "
            "break its graph. Pass the parameter itself, or `detach()` it"
        )


def _rows_in_memory(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """(rows, elements from one row to the next), with consecutive elements inside a row and no row
    in another. None where the elements, in row-major order, are not laid out so."""
    if 0 in shape:
        return 1, 0
    # Dimensions are taken from the innermost, without those of size 1. Each joins the row while it
    # continues it, then the rows while it continues those.
    row_length, rows, stride = 1, 1, 0
    for size, step in reversed(list(zip(shape, strides, strict=True))):
        if size == 1:
            continue
        if rows == 1 and step == row_length:
            row_length *= size
        elif rows == 1:
            rows, stride = size, step
        elif step == rows * stride:
            rows *= size
        else:
            return None
    if rows == 1:
        return 1, row_length
    return (rows, stride) if stride >= row_length else None


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements have the same address."""
    steps = sorted((step, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    steps = [(step, size) for step, size in steps if size > 1]
    reach, nested = 0, True
    for step, size in steps:
        nested = nested and step > reach
        reach += (size - 1) * step
    if nested:  # each dimension steps over all inner ones
        return False
    if tensor.numel() > reach + 1:  # more elements than places
        return True
    # Dimensions may still interleave, as with sizes (3, 2) and strides (2, 3): list every place.
    places = torch.zeros((), dtype=torch.int64)
    for step, size in steps:
        places = places[..., None] + step * torch.arange(size)
    return places.unique().numel() < tensor.numel()


def _check_disjoint(segments: Sequence[Segment], names: Sequence[str]) -> None:
    """Refuses shared memory: two writers of one element would race, and a tied weight would be
    perturbed twice."""
    places = [
        (_Place.of(segment.tensor), name)
        for segment, name in zip(segments, names, strict=True)
        if segment.elements
    ]
    places.sort(key=lambda place: place[0][:3])
    before: list[tuple[_Place, str]] = []
    for place, name in places:
        before = [
            other for other in before
            if other[0].device == place.device and other[0].end > place.begin
        ]  # fmt: skip
        for other, other_name in before:
            if not _interleaved(other, place):
                raise ValueError(
                    f"{other_name} and {name} share memory: pass tied weights once, and views "
                    "that do not overlap"
                )
        before.append((place, name))


class _Place(NamedTuple):
    """The memory of a tensor's elements, in any order."""

    device: str
    begin: int
    end: int
    element_size: int
    rows: int
    """0 where the elements are not rows, in any order."""
    row_length: int
    row_stride: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        size, begin = tensor.element_size(), tensor.data_ptr()
        steps = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
        reach = sum((length - 1) * step for step, length in steps)
        end = begin + (reach + 1) * size
        found = _rows_in_memory([length for _, length in steps], [step for step, _ in steps])
        rows, stride = found or (0, 0)
        length = tensor.numel() // rows if rows else 0
        return cls(str(tensor.device), begin, end, size, rows, length, stride)


def _interleaved(a: _Place, b: _Place) -> bool:
    """Whether two row-strided tensors whose address ranges meet have no element in common."""
    size = a.element_size
    if b.element_size != size or a.row_stride != b.row_stride or min(a.rows, b.rows) < 2:
        return False
    distance = b.begin - a.begin
    column = distance // size % a.row_stride
    return distance % size == 0 and a.row_length <= column <= a.row_stride - b.row_length
