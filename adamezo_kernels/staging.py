"""Staged tensors: tensors whose elements are not rows in memory, such as ``weight.t()``.

Kernels walk rows. An operation on a staged tensor runs on a contiguous copy of a block of it, in
which elements keep their indices in the tensor, and the block is then copied back. So every backend
gives the bits that a contiguous tensor would have, and kernels need no code for staged tensors.

The plan holds the memory for copies and the kernels' tables of it, so that a step captured in a
CUDA graph finds both where they were. Each stream has memory of its own, as memory that torch
allocates belongs to one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .plan import Plan, Segment

BLOCK = 2**20
"""The largest number of elements copied at a time: enough to keep a GPU busy between two launches,
and few enough to stay in the caches of a CPU."""

_ALIGNMENT = 32  # elements, so that copies are as well aligned as torch's own tensors


class Staging:
    """Memory for copies: up to BLOCK elements of each type, on each device and stream.

    Plans that never run at the same time may share it.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes for memory in self._memory.values())

    def memory(self, device: torch.device, dtype: torch.dtype, capacity: int) -> Tensor:
        key = device, dtype, _stream(device)
        if key not in self._memory or self._memory[key].numel() < capacity:
            # The first plan may have small tensors, others larger ones: at most two sizes.
            capacity = BLOCK if key in self._memory else capacity
            self._memory[key] = torch.empty(capacity, dtype=dtype, device=device)
        return self._memory[key]


class Batch:
    """Blocks that one call works on.

    Attributes:
        plan: the plan of their copies.
    """

    def __init__(self, plan: Plan, blocks: Sequence[_Block]) -> None:
        self.plan = plan
        self._blocks = blocks

    @torch.no_grad()
    def copy_out(self) -> None:
        for block in self._blocks:
            block.copy.copy_(block.source())

    def copy_back(self) -> None:
        for block in self._blocks:
            tensor = block.tensor()
            # An inference tensor can be written in inference mode alone.
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(block.copy)


class _Block(NamedTuple):
    """A piece of a tensor, the piece that is read for it, and the memory for its copy.

    The first two are views made on demand: a stored view would count as a user of memory whose
    users exact perturbation watches.
    """

    tensor: Callable[[], Tensor]
    source: Callable[[], Tensor]
    copy: Tensor


def batches(plan: Plan) -> list[Batch]:
    """The batches of a plan's staged segments for the current streams."""
    if not plan.staged:
        return []
    devices = sorted({segment.tensor.device for segment in plan.staged}, key=str)
    streams = tuple(map(_stream, devices))
    made = plan.batches.get(streams)
    if made is None and any(map(capturing, devices)):
        # As with the tables (backends/cuda.py), batches made on another stream will do.
        made = next(iter(plan.batches.values()), None)
    if made is None:
        # These tensors are used in every mode, whatever the current one is.
        with torch.inference_mode(False), torch.no_grad():
            made = plan.batches[streams] = list(_make(plan))
    return made


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether operations there are captured into a CUDA graph, to run later."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _make(plan: Plan) -> Iterator[Batch]:
    def kind(segment: Segment) -> tuple[str, str]:
        return str(segment.tensor.device), str(segment.tensor.dtype)

    for _, group in groupby(sorted(plan.staged, key=kind), key=kind):
        members = list(group)
        capacity = min(BLOCK, sum(_aligned(segment.elements) for segment in members))
        first = members[0].tensor
        memory = plan.staging.memory(first.device, first.dtype, capacity)
        blocks: list[_Block] = []
        segments: list[Segment] = []
        used = 0
        for segment in members:
            begin = 0
            tensors, sources = _pieces(segment.tensor), _pieces(segment.source)
            for (shape, tensor), (_, source) in zip(tensors, sources, strict=True):
                size = shape.numel()
                if used + size > capacity:
                    yield Batch(plan._of(segments), blocks)
                    blocks, segments, used = [], [], 0
                copy = memory[used : used + size]
                blocks.append(_Block(tensor, source, copy.view(shape)))
                segments += _rows(segment, begin, copy)
                begin += size
                used = _aligned(used + size)
        yield Batch(plan._of(segments), blocks)


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _pieces(tensor: Tensor) -> Iterator[tuple[torch.Size, Callable[[], Tensor]]]:
    """For each block of a tensor: its shape, and a function that makes the view of it."""
    start = int(tensor.storage_offset())
    for block in blocks_of(tensor.detach()):
        shape, strides, offset = block.shape, block.stride(), int(block.storage_offset()) - start

        def view(shape=shape, strides=strides, offset=offset) -> Tensor:  # type: ignore[no-untyped-def]
            now = int(tensor.storage_offset())
            return tensor.detach().as_strided(shape, strides, now + offset)

        yield shape, view


def blocks_of(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most BLOCK elements each, which tile a tensor in row-major order."""
    if tensor.numel() <= BLOCK:
        yield tensor
        return
    inner = tensor.numel() // tensor.shape[0]
    if inner > BLOCK:
        for part in tensor:
            yield from blocks_of(part)
    else:
        yield from tensor.split(BLOCK // inner)


def _rows(segment: Segment, begin: int, copy: Tensor) -> Iterator[Segment]:
    """``copy`` as segments: of the elements from ``begin`` on, counted in the segment row by row.
    There are at most three: the end of a row, whole rows, and the beginning of one."""
    length = segment.row_length
    taken = 0
    while taken < copy.numel():
        left = copy.numel() - taken
        row, column = divmod(begin + taken, length)
        if column or left < length:
            rows, size = 1, min(length - column, left)
        else:
            rows, size = left // length, length
        stop = taken + rows * size
        tensor = copy[taken:stop]
        yield replace(
            segment,
            tensor=tensor,
            rows=rows,
            row_length=size,
            row_stride=size,
            index_offset=segment.index_offset + row * segment.index_stride + column,
            source=tensor,
            source_stride=size,
            buffers=tuple(
                buffer.detach().view(-1)[begin + taken : begin + stop] for buffer in segment.buffers
            ),
            staged=False,
        )
        taken = stop
