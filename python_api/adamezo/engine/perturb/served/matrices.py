"""Matrices W + c Z: a function of one is computed from W and the direction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .blocks import (
    Blocks,
    NotServed,
    binary,
    bound,
    getter,
    leaves,
    name_of,
    properties,
    refused,
    same,
    unary,
    uneven,
    writes,
)
from .vectors import Stacked, stacked

_T = torch.Tensor

SMALL = 2**16
"""How many elements a matrix may have of which a batch has a copy for each perturbation."""


class StandIn(nn.Parameter):
    """Stands for a matrix W + c Z; ``turned`` for its transpose."""

    raw: Tensor
    """The weight, or its transpose."""
    label: str
    place: int
    blocks: Blocks
    turned: bool

    @staticmethod
    def of(tensor: Tensor, name: str, place: int, blocks: Blocks, turned: bool = False) -> StandIn:
        made = torch.Tensor._make_subclass(StandIn, tensor.detach(), False)
        made.raw, made.label, made.place = tensor, name, place
        made.blocks, made.turned = blocks, turned
        return made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        serve = _functions().get(function)
        with torch._C.DisableTorchFunctionSubclass():
            if function in properties():
                return function(*args, **kwargs)
            try:
                if serve is not None:
                    return serve(function, args, kwargs)
            except NotServed:
                pass
            return _of_small_ones(function, args, kwargs)

    def transposed(self) -> StandIn:
        with self.blocks.working():
            turned = self.raw.t()
            return StandIn.of(turned, self.label, self.place, self.blocks, not self.turned)


def _linear(function: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias = bound(args, kwargs, ("input", "weight", "bias"))
    if not _is_product(x, weight, bias):
        _refuse(function, args, kwargs, " in this form")
    return _product(function, x, weight, F.linear, bias)


def _is_product(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether of a product and a bias only the second factor is a perturbed matrix."""
    special = isinstance(x, (StandIn, Stacked)) or isinstance(bias, StandIn)
    return not special and isinstance(weight, StandIn) and weight.dim() == 2


def _refuse(function: Any, args: Any, kwargs: Any, why: str) -> NoReturn:
    found = next(t for t in leaves(args, kwargs) if isinstance(t, StandIn))
    refused(found.blocks, found.label, function, why)


def _product(
    function: Any, x: Tensor, weight: StandIn, compute: Callable[..., Tensor],
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``compute(x, W, bias)``, which is x W^T and the bias, of the perturbed matrix."""
    with weight.blocks.working():
        return weight.blocks.kind.product(function, x, weight, compute, bias)


def _matmul(function: Any, args: Any, kwargs: Any) -> Any:
    x, weight = bound(args, kwargs, ("input", "other"))
    if not _is_product(x, weight):
        _refuse(function, args, kwargs, " on the left")
    return _product(
        function, x, weight.transposed(), lambda x, w, bias=None: torch.matmul(x, w.t())
    )


def _addmm(function: Any, args: Any, kwargs: Any) -> Any:
    bias, x, weight, beta, alpha = bound(args, kwargs, ("input", "mat1", "mat2", "beta", "alpha"))
    plain = (beta or 1) == 1 and (alpha or 1) == 1
    if (
        not plain
        or not _is_product(x, weight, bias)
        or (isinstance(bias, Stacked) and bias.dim() != 1)
    ):
        _refuse(function, args, kwargs, " in this form")

    def compute(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.mm(x, w.t()) if bias is None else torch.addmm(bias, x, w.t())

    if bias.shape != weight.shape[1:]:  # an element for each row, or one for all
        return _product(function, x, weight.transposed(), compute) + bias
    return _product(function, x, weight.transposed(), compute, bias)


def _embedding(function: Any, args: Any, kwargs: Any) -> Any:
    ids, weight, _, max_norm = bound(args, kwargs, ("input", "weight", "padding_idx", "max_norm"))
    if max_norm is not None:
        _refuse_to_write(function, weight)
    blocks = weight.blocks
    # In a batch not those of the batch, but such as positions, which all its rows have in common.
    shared = not _repeated(ids, blocks)
    with blocks.working():
        y = blocks.kind.embedding(ids, weight, shared)
    return stacked(y, weight.label, blocks) if shared else y


def _repeated(ids: Tensor, blocks: Blocks) -> bool:
    """Whether indices are those of a batch, in which a closure has repeated its inputs: blocks of
    the same part of these have the same."""
    if blocks.count == 1:
        return True
    if ids.dim() == 0 or ids.shape[0] % blocks.count:
        return False
    if len(set(blocks.parts)) == blocks.count:  # nothing is repeated
        return ids.shape[0] in blocks.rows
    pieces = ids.unflatten(0, (blocks.count, -1))
    first = [blocks.parts.index(part) for part in blocks.parts]
    return bool((pieces == pieces[first]).all())


def _convolution(function: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, stride, padding, dilation, groups = bound(
        args, kwargs, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    )
    if not isinstance(weight, StandIn) or (groups or 1) != 1 or isinstance(bias, StandIn):
        _refuse(function, args, kwargs, " with groups, or not as its weight")
    blocks = weight.blocks
    if x.dim() != weight.dim() or x.shape[0] % blocks.count:
        refused(blocks, weight.label, function, uneven(x.shape[0], blocks))
    more = dict(stride=stride or 1, padding=padding or 0, dilation=dilation or 1)

    def compute(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = function(x, w, bias, **more)
        return result

    with blocks.working():
        return blocks.kind.convolution(x, weight, compute, bias)


def _whole(function: Any, args: Any, kwargs: Any) -> Any:
    """A function of the perturbed matrices themselves, which exist while it runs."""
    found = next(t for t in leaves(args, kwargs) if isinstance(t, StandIn))
    if writes(function, kwargs):
        _refuse_to_write(function, found)

    def of(value: Any) -> Any:
        if not isinstance(value, StandIn):
            return value
        with value.blocks.working():
            whole = value.blocks.kind.whole(value)
        return whole[0] if value.blocks.count == 1 else stacked(whole, value.label, value.blocks)

    args, kwargs = tree_map(of, (args, kwargs))
    if found.blocks.count > 1:
        return Stacked.__torch_function__(function, (Stacked,), args, kwargs)
    return function(*args, **kwargs)


def _of_small_ones(function: Any, args: Any, kwargs: Any) -> Any:
    """A function that is not served: of the perturbed matrices, but of large ones not in a batch,
    which would take the memory of all perturbations."""
    for matrix in leaves(args, kwargs):
        if isinstance(matrix, StandIn) and matrix.numel() > SMALL:
            if matrix.blocks.count > 1:
                refused(matrix.blocks, matrix.label, function)
    return _whole(function, args, kwargs)


def _refuse_to_write(function: Any, matrix: StandIn) -> NoReturn:
    matrix.blocks.refuse(
        f"{matrix.label} is written in a forward, by {name_of(function)}: with "
        "perturbation='regenerated' that would be lost. Do it outside of the step"
    )


def _transposed(function: Any, args: Any, kwargs: Any) -> Any:
    matrix = args[0]
    if matrix.dim() != 2:
        return _of_small_ones(function, args, kwargs)
    if function is torch.Tensor.transpose or function is torch.transpose:
        dims = {d % 2 for d in (*args[1:], *kwargs.values())}
        if dims != {0, 1}:
            return matrix
    return matrix.transposed()


def _cast(function: Any, args: Any, kwargs: Any) -> Any:
    """Another type: of the weight, as directions are float32 anyway."""
    matrix = args[0]
    with matrix.blocks.working():
        other = function(matrix.raw, *args[1:], **kwargs)
        return StandIn.of(other, matrix.label, matrix.place, matrix.blocks, matrix.turned)


@functools.cache
def _functions() -> dict[Any, Callable[..., Any]]:
    """What serves a function one of whose arguments is a matrix's stand-in."""
    table: dict[Any, Callable[..., Any]] = {
        F.linear: _linear,
        torch.addmm: _addmm,
        _T.addmm: _addmm,
        F.embedding: _embedding,
        F.conv1d: _convolution,
        F.conv2d: _convolution,
        F.conv3d: _convolution,
    }
    table.update(dict.fromkeys((torch.matmul, torch.mm, _T.matmul, _T.mm, _T.__matmul__), _matmul))
    turns = (torch.t, _T.t, torch.transpose, _T.transpose, getter("T"), getter("mT"))
    table.update(dict.fromkeys(turns, _transposed))
    table.update(dict.fromkeys((_T.detach, _T.contiguous, getter("data")), same))
    casts = (_T.to, _T.float, _T.half, _T.bfloat16, _T.double, _T.type, _T.type_as)
    table.update(dict.fromkeys(casts, _cast))
    views = (_T.__getitem__, _T.expand, _T.unsqueeze, torch.unsqueeze)
    table.update(dict.fromkeys((*unary(), *binary(), *views), _whole))
    return table
