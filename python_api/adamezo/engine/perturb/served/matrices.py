"""Matrices W + c u v^T: a function of one is that of W, corrected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
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
from .vectors import Stacked, stacked, with_bias

_T = torch.Tensor

SMALL = 2**16
"""How many elements a matrix may have of which a batch has a copy for each perturbation."""


class StandIn(nn.Parameter):
    """Stands for a matrix W + c u v^T; ``turned`` for its transpose."""

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

    def factor(self) -> tuple[Tensor, Tensor]:
        """u and v, of shape (blocks, rank, rows) and (blocks, rank, columns), or with 1 in place of
        the number of blocks where all have the same."""
        found = [factors.of[self.place] for factors in self.blocks.factors]
        which = self.blocks.which
        if len(found) == 1:
            u, v = found[0].u[None], found[0].v[None]  # type: ignore[index]
        else:
            u = torch.stack([found[k].u for k in which])
            v = torch.stack([found[k].v for k in which])  # type: ignore[misc]
        return (v, u) if self.turned else (u, v)

    def transposed(self) -> StandIn:
        with self.blocks.working():
            turned = self.raw.t()
            return StandIn.of(turned, self.label, self.place, self.blocks, not self.turned)

    def whole(self) -> Tensor:
        """The perturbed matrix of each block, of shape (blocks, *shape): for small ones, of which
        every element is read."""
        u, v = self.factor()
        z = torch.einsum("kqm,kqn->kmn", u, v)
        scales = self.blocks.scales.to(z.device).view(-1, 1, 1)
        weight = self.raw.float()
        flat = weight.reshape(weight.shape[0], -1)
        return (flat + scales * z).view(-1, *weight.shape).to(self.dtype)


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


def _without_autocast(tensor: Tensor) -> Any:
    """A context for float32 arithmetic. Entering autocast costs as much as a small product."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _linear(function: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias = bound(args, kwargs, ("input", "weight", "bias"))
    if not _is_product(x, weight, bias):
        _refuse(function, args, kwargs, " in this form")
    if isinstance(bias, Stacked):
        return with_bias(_product(function, x, weight, lambda w: F.linear(x, w)), bias, -1)
    return _product(function, x, weight, lambda w: F.linear(x, w, bias))


def _is_product(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether of a product and a bias only the second factor is a perturbed matrix."""
    special = isinstance(x, (StandIn, Stacked)) or isinstance(bias, StandIn)
    return not special and isinstance(weight, StandIn) and weight.dim() == 2


def _refuse(function: Any, args: Any, kwargs: Any, why: str) -> NoReturn:
    found = next(t for t in leaves(args, kwargs) if isinstance(t, StandIn))
    refused(found.blocks, found.label, function, why)


def _product(function: Any, x: Tensor, weight: StandIn, compute: Callable[..., Tensor]) -> Tensor:
    """``compute(W)``, which is x W^T and something, corrected."""
    with weight.blocks.working():
        y = compute(weight.raw)
        with _without_autocast(y):
            u, v = weight.factor()
            return _add(y, _times(x, v, weight, function), u, weight.blocks)


def _matmul(function: Any, args: Any, kwargs: Any) -> Any:
    x, weight = bound(args, kwargs, ("input", "other"))
    if not _is_product(x, weight):
        _refuse(function, args, kwargs, " on the left")
    return _product(function, x, weight.transposed(), lambda w: torch.matmul(x, w.t()))


def _addmm(function: Any, args: Any, kwargs: Any) -> Any:
    bias, x, weight, beta, alpha = bound(args, kwargs, ("input", "mat1", "mat2", "beta", "alpha"))
    if not _is_product(x, weight, bias) or (beta or 1) != 1 or (alpha or 1) != 1:
        _refuse(function, args, kwargs, " in this form")
    turned = weight.transposed()
    if isinstance(bias, Stacked):
        return with_bias(_product(function, x, turned, lambda w: torch.mm(x, w.t())), bias, -1)
    return _product(function, x, turned, lambda w: torch.addmm(bias, x, w.t()))


def _embedding(function: Any, args: Any, kwargs: Any) -> Any:
    ids, weight, padding, max_norm, *_ = bound(
        args, kwargs,
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    )  # fmt: skip
    if max_norm is not None:
        _refuse_to_write(function, weight)
    blocks = weight.blocks
    count = blocks.count
    with blocks.working():
        y = F.embedding(ids, weight.raw, padding)
        u, v = weight.factor()  # the rows that are read are those of u: y + c u[ids] v
        of_row = u.transpose(1, 2).expand(count, -1, -1)
        if _repeated(ids, count):
            pieces = ids.reshape(count, -1)
            rows = torch.stack([F.embedding(pieces[k], of_row[k]) for k in range(count)])
            return _add(y, rows, v, blocks)
        # Such as positions, which all rows of the batch have in common.
        rows = torch.stack([F.embedding(ids.flatten(), of_row[k]) for k in range(count)])
        y = _add(y.expand(count, *y.shape), rows, v, blocks)
    return stacked(y, weight.label, blocks)


def _repeated(ids: Tensor, count: int) -> bool:
    """Whether indices are those of a batch, in which a closure has repeated its inputs."""
    if count == 1:
        return True
    if ids.dim() == 0 or ids.shape[0] % count:
        return False
    pieces = ids.unflatten(0, (count, -1))
    return bool((pieces == pieces[:1]).all())


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
    with blocks.working():
        y = function(x, weight.raw, None if isinstance(bias, Stacked) else bias, **more)
        with _without_autocast(y):
            u, v = weight.factor()
            # A convolution with v has a channel for each term, which u spreads over all channels.
            kernels = v.expand(blocks.count, -1, -1).unflatten(2, weight.shape[1:])
            u = u.expand(blocks.count, -1, -1)
            pieces = x.float().unflatten(0, (blocks.count, -1))
            scales = blocks.scales.to(x.device)
            added = [
                scales[k]
                * torch.einsum(
                    "bq...,qm->bm...", function(pieces[k], kernels[k], None, **more), u[k]
                )
                for k in range(blocks.count)
            ]
            y = (y.float() + torch.cat(added)).to(y.dtype)
    return with_bias(y, bias, 1) if isinstance(bias, Stacked) else y


def _whole(function: Any, args: Any, kwargs: Any) -> Any:
    """A function of the perturbed matrices themselves, which exist while it runs."""
    found = next(t for t in leaves(args, kwargs) if isinstance(t, StandIn))
    if writes(function, kwargs):
        _refuse_to_write(function, found)

    def of(value: Any) -> Any:
        if not isinstance(value, StandIn):
            return value
        with value.blocks.working():
            whole = value.whole()
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
    """Another type: of the weight, whose factors are float32 anyway."""
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
