"""Questions about the memory of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is elements in one piece of memory; sparse and wrapped ones are not."""
    return (
        tensor.layout == torch.strided
        and not is_traceable_wrapper_subclass(tensor)
        and not tensor.is_nested
    )


def storage_of(tensor: Tensor) -> int:
    """The identity of the storage that a tensor is in."""
    return tensor.untyped_storage()._cdata


def extent_of(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one behind its last."""
    begin = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((int(size) - 1) * int(step) for size, step in steps)
    return begin, begin + (last + 1) * tensor.element_size()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the extents of two tensors have bytes in common."""
    (begin, end), (first, last) = extent_of(a), extent_of(b)
    return storage_of(a) == storage_of(b) and begin < last and first < end
