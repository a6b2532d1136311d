"""Weights of which each rank holds a piece: torch's DTensors, as FSDP2 and tensor parallel make."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adamezo_kernels import Shard

from .perturb.interface import forget_cached_weights


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a piece or a copy."""
    # Whoever has one has imported its module, which takes a second to import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as elements in memory: the same object at each call until
    somebody replaces it."""
    if not is_sharded(tensor):
        return tensor
    # torch's `to_local` makes a new object each time for a Parameter, by which nobody could tell
    # whether it was replaced; fully_shard too goes by this one.
    piece: Tensor = _as_any(tensor)._local_tensor
    return piece


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor: its ranks call this together."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        gathered: Tensor = _as_any(tensor).full_tensor()
    return gathered


def _as_any(tensor: Tensor) -> Any:
    return tensor  # types would need the import


def filled_like(tensor: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of another type, in pieces as this one is."""
    if is_sharded(tensor):
        return torch.full_like(tensor, value, dtype=dtype, requires_grad=False)
    return torch.full(tensor.shape, value, dtype=dtype, device=tensor.device)


def shard_of(tensor: Tensor, name: str) -> Shard | None:
    """The place of this rank's elements in the whole parameter; None where it has all of them.

    Raises:
        ValueError: a placement by which no rank has the weights, or has rows that are not evenly
            spaced; the message names the parameter and the placement.
    """
    if not is_sharded(tensor):
        return None
    placed = _as_any(tensor)
    mesh, placements, shape = placed.device_mesh, placed.placements, tuple(tensor.shape)

    def refuse(why: str) -> ValueError:
        return ValueError(
            f"{name} is a DTensor with placements {placements} on a mesh of shape "
            f"{tuple(mesh.shape)}, {why}: expected Shard and Replicate, as fully_shard and "
            "parallelize_module place parameters"
        )

    at = mesh.get_coordinate()
    if at is None:
        raise refuse("of which this rank is no member")
    start: list[int] = [0] * len(shape)
    size: list[int] = list(shape)
    for i in _order(placements, mesh.shape, refuse):
        d = placements[i].dim % len(shape)
        # As torch.chunk has it: equal parts, of which the last ones may be smaller or empty.
        part = -(-size[d] // mesh.shape[i])
        first = min(at[i] * part, size[d])
        start[d], size[d] = start[d] + first, min(part, size[d] - first)
    have = tuple(local(tensor).shape)
    if have != tuple(size) and (0 not in have or 0 not in size):
        raise refuse(f"and has a piece of shape {have} where torch.chunk gives {tuple(size)}")
    place = Shard.of_box(shape, start, size)
    if place is None:
        raise refuse("whose elements here are not rows with one distance between them")
    return place


def _order(placements: Any, sizes: Any, refuse: Callable[[str], ValueError]) -> list[int]:
    """The mesh dimensions that cut the tensor, in the order in which they cut it: from left to
    right, but that FSDP2 cuts what tensor parallel, to its right, has cut before."""
    order: list[int] = []
    for i, placement in enumerate(placements):
        kind = type(placement).__name__
        if placement.is_partial():
            raise refuse("so that its elements are sums over ranks, which none of them has")
        if placement.is_replicate():
            continue
        if kind not in ("Shard", "_StridedShard"):
            raise refuse(f"where {kind} is not known here")
        if kind == "Shard":
            order.append(i)
            continue
        later = [k for k in range(i + 1, len(sizes)) if _cuts(placements[k], placement.dim)]
        if placement.split_factor != math.prod(sizes[k] for k in later):
            raise refuse("whose split factor is not the number of pieces to its right")
        order.append(i)
    strided = [i for i in order if type(placements[i]).__name__ == "_StridedShard"]
    return [i for i in order if i not in strided] + strided[::-1]


def _cuts(placement: Any, dim: int) -> bool:
    return getattr(placement, "dim", None) == dim


def reshard(model: nn.Module) -> None:
    """Lets the next forward gather the pieces of FSDP2's modules again.

    The root, and whoever is told so, keeps what a forward has gathered until a backward, which
    never comes here: the next forward would not see what a perturbation has written.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    sharding = getattr(module, "FSDPModule", ())
    for each in model.modules():
        if isinstance(each, sharding):
            # Without this a module in which a forward was cut short would keep them, too.
            each.set_reshard_after_forward(True, recurse=False)
            each.reshard()


def forgetting(model: nn.Module) -> Callable[[], None]:
    """Forgets whatever was computed or gathered from weights that have changed since."""

    def forget() -> None:
        forget_cached_weights()
        reshard(model)

    return forget
