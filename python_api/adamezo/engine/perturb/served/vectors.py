"""Vectors that have another value in each block of a batch. They are small: each is perturbed as a
copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Blocks, binary, bound, getter, leaves, properties, refused, same, unary, uneven

_T = torch.Tensor


class Stacked(nn.Parameter):
    """Stands for a tensor that has another value in each block of a batch. Its own shape is that of
    one of them."""

    stack: Tensor
    label: str
    blocks: Blocks

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (Stacked, Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # it is for the matrix among them
        serve = _functions().get(function)
        with torch._C.DisableTorchFunctionSubclass():
            if serve is not None:
                return serve(function, args, kwargs)
            if function in properties():
                return function(*args, **kwargs)
            found = next(t for t in leaves(args, kwargs) if isinstance(t, Stacked))
            refused(found.blocks, found.label, function)

    def shaped(self, *shape: int) -> Stacked:
        return stacked(self.stack.reshape(self.blocks.count, *shape), self.label, self.blocks)


def stacked(stack: Tensor, name: str, blocks: Blocks) -> Stacked:
    """Stands for ``stack[k]`` in block k."""
    made = torch.Tensor._make_subclass(Stacked, stack[0].detach(), False)
    made.stack, made.label, made.blocks = stack, name, blocks
    return made


def elementwise(function: Any, args: Any, kwargs: Any) -> Any:
    """Arithmetic with other numbers and tensors. Those with a batch are taken block by block."""
    some = next(a for a in args if isinstance(a, Stacked))
    blocks, dims = some.blocks, some.stack.dim() - 1

    def batched(value: Any) -> bool:
        if not isinstance(value, Tensor) or isinstance(value, Stacked) or value.dim() < dims:
            return False
        return value.dim() > dims or (dims > 0 and some.shape[0] == 1 and value.shape[0] > 1)

    in_batch = [a for a in args if batched(a)]
    most = max(a.dim() for a in in_batch or args if isinstance(a, Tensor))

    def of(value: Any) -> Any:
        if isinstance(value, Stacked):  # its first dimension, of size 1, is that of the rows
            missing = [1] * (most - value.dim())
            return value.stack.reshape(blocks.count, *missing, *value.shape)
        if batched(value):
            if value.shape[0] % blocks.count:
                refused(blocks, some.label, function, uneven(value.shape[0], blocks))
            return value.unflatten(0, (blocks.count, -1))
        return value

    result = function(*[of(a) for a in args], **kwargs)
    return result.flatten(0, 1) if in_batch else stacked(result, some.label, blocks)


def _matmul(function: Any, args: Any, kwargs: Any) -> Any:
    """A product of matrices of each block, or of rows of the batch with one on the right."""
    a, b = bound(args, kwargs, ("input", "other"))
    some = a if isinstance(a, Stacked) else b
    blocks, count = some.blocks, some.blocks.count
    if isinstance(a, Stacked):
        if a.dim() < 2 or b.dim() != a.dim():
            refused(blocks, some.label, function, " of these shapes")
        right = b.stack if isinstance(b, Stacked) else b
        return stacked(torch.matmul(a.stack, right), some.label, blocks)
    if b.dim() != 2 or a.dim() < 2 or a.shape[0] % count:
        refused(blocks, some.label, function, uneven(a.shape[0], blocks))
    matrices = b.stack.view(count, *[1] * (a.dim() - 2), *b.shape)
    return torch.matmul(a.unflatten(0, (count, -1)), matrices).flatten(0, 1)


def _each(function: Any, args: Any, kwargs: Any) -> Any:
    """A function of one tensor, element by element or to another type."""
    first, *rest = args
    if any(isinstance(a, Stacked) for a in rest):
        refused(first.blocks, first.label, function)
    return stacked(function(first.stack, *rest, **kwargs), first.label, first.blocks)


def _reshaped(function: Any, args: Any, kwargs: Any) -> Any:
    first, *rest = args
    return first.shaped(*_sizes(rest))


def _expanded(function: Any, args: Any, kwargs: Any) -> Any:
    first, *rest = args
    shape = _sizes(rest)
    stack = first.stack
    stack = stack.reshape(stack.shape[0], *[1] * (len(shape) - stack.dim() + 1), *stack.shape[1:])
    if stack.shape[1] == 1 and shape[0] in first.blocks.rows:  # to the rows of the batch
        return stack.expand(-1, shape[0] // first.blocks.count, *shape[1:]).flatten(0, 1)
    return stacked(stack.expand(-1, *shape), first.label, first.blocks)


def _permuted(function: Any, args: Any, kwargs: Any) -> Any:
    first, *rest = args
    dims = [d % first.dim() + 1 for d in _sizes(rest)]
    return stacked(first.stack.permute(0, *dims), first.label, first.blocks)


def _attention(function: Any, args: Any, kwargs: Any) -> Any:
    """Attention whose bias is computed from weights, such as T5's: the same for all rows."""
    names = ("query", "key", "value", "attn_mask")
    query, key, value, mask = bound(args, kwargs, names)
    some = next(t for t in leaves(args, kwargs) if isinstance(t, Stacked))
    rows, blocks = query.shape[0], some.blocks
    if any(isinstance(t, Stacked) for t in (query, key, value)) or mask.dim() != query.dim():
        refused(blocks, some.label, function)
    if mask.shape[0] != 1 or rows % blocks.count:
        refused(blocks, some.label, function, uneven(rows, blocks))
    mask = mask.stack.expand(-1, rows // blocks.count, *mask.shape[1:]).flatten(0, 1)
    more = {k: v for k, v in kwargs.items() if k not in names}
    return function(query, key, value, mask, *args[4:], **more)


def _added(function: Any, args: Any, kwargs: Any) -> Any:
    """In place, to a tensor of the batch."""
    first, *rest = args
    found = next(a for a in args if isinstance(a, Stacked))
    if isinstance(first, Stacked):
        refused(found.blocks, found.label, function)
    return first.copy_(elementwise(torch.add, (first, *rest), kwargs))


def _sizes(arguments: Sequence[Any]) -> Sequence[int]:
    """The sizes or dimensions of a call that takes them one by one or as a sequence."""
    one = len(arguments) == 1 and isinstance(arguments[0], (tuple, list))
    return arguments[0] if one else arguments


def _indexed(function: Any, args: Any, kwargs: Any) -> Any:
    first, index = args
    index = index if isinstance(index, tuple) else (index,)
    whole = (slice(None), *index)
    return stacked(first.stack[whole], first.label, first.blocks)


def _unbound(function: Any, args: Any, kwargs: Any) -> Any:
    first, dim = bound(args, kwargs, ("input", "dim"))
    pieces = first.stack.unbind((dim or 0) % first.dim() + 1)
    return tuple(stacked(piece, first.label, first.blocks) for piece in pieces)


def _unsqueezed(function: Any, args: Any, kwargs: Any) -> Any:
    first, dim = bound(args, kwargs, ("input", "dim"))
    return stacked(first.stack.unsqueeze(dim + 1 if dim >= 0 else dim), first.label, first.blocks)


def with_bias(y: Tensor, bias: Stacked, dim: int) -> Tensor:
    """``y`` and a bias of each block along its dimension ``dim``."""
    return _along(torch.add, y, bias, dim)


def _along(function: Any, y: Tensor, vector: Tensor | None, dim: int) -> Tensor:
    """Arithmetic of ``y`` with a vector along its dimension ``dim``, in the type of ``y``."""
    if vector is None:
        return y
    shape = (-1, *[1] * (y.dim() - 1 - dim % y.dim()))
    if isinstance(vector, Stacked):
        vector = stacked(vector.stack.to(y.dtype), vector.label, vector.blocks)
        result: Tensor = elementwise(function, (y, vector.shaped(*shape)), {})
        return result
    result = function(y, vector.to(y.dtype).view(shape))
    return result


def _biased(function: Any, args: Any, kwargs: Any) -> Any:
    """A linear function or a convolution whose matrix is not trained, with a bias that is."""
    x, weight, bias = bound(args, kwargs, ("input", "weight", "bias"))
    if isinstance(x, Stacked) or isinstance(weight, Stacked):
        found = next(t for t in (x, weight) if isinstance(t, Stacked))
        refused(found.blocks, found.label, function)
    more = {name: value for name, value in kwargs.items() if name not in ("weight", "bias")}
    y = function(x, weight, None, *args[3:], **more)
    return with_bias(y, bias, -1 if function is F.linear else 1)


def _plus_product(function: Any, args: Any, kwargs: Any) -> Any:
    """addmm of a bias and a matrix that is not trained."""
    bias, a, b = bound(args, kwargs, ("input", "mat1", "mat2"))
    if len(args) > 3 or kwargs or not isinstance(bias, Stacked):
        found = next(t for t in leaves(args, kwargs) if isinstance(t, Stacked))
        refused(found.blocks, found.label, function, " in this form")
    return with_bias(torch.mm(a, b), bias, -1)


def _normalized(function: Any, args: Any, kwargs: Any) -> Any:
    """layer_norm and rms_norm, with weights of each block."""
    if function is F.rms_norm or function is torch.rms_norm:
        names = ("input", "normalized_shape", "weight", "eps", "bias")
    else:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, bound(args, kwargs, names), strict=True))
    more = {} if given["eps"] is None else {"eps": given["eps"]}
    y = function(given["input"], given["normalized_shape"], **more)
    return _along(torch.add, _along(torch.mul, y, given["weight"], -1), given["bias"], -1)


def _normalized_by_channel(function: Any, args: Any, kwargs: Any) -> Any:
    """batch_norm and group_norm, with weights of each block."""
    names = ["input", "num_groups", "weight", "bias", "eps"]
    if function is F.batch_norm:
        names[1:] = ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    given = dict(zip(names, bound(args, kwargs, names), strict=True))
    others = {"input", "weight", "bias"}
    more = {k: value for k, value in given.items() if k not in others and value is not None}
    y = function(given["input"], **more)
    return _along(torch.add, _along(torch.mul, y, given["weight"], 1), given["bias"], 1)


@functools.cache
def _functions() -> dict[Any, Callable[..., Any]]:
    """What serves a function of vectors of each block."""
    table: dict[Any, Callable[..., Any]] = {
        F.linear: _biased,
        torch.addmm: _plus_product,
        F.layer_norm: _normalized,
        torch.layer_norm: _normalized,
        F.rms_norm: _normalized,
        torch.rms_norm: _normalized,
        F.batch_norm: _normalized_by_channel,
        F.group_norm: _normalized_by_channel,
        F.conv1d: _biased,
        F.conv2d: _biased,
        F.conv3d: _biased,
        _T.expand: _expanded,
        _T.__getitem__: _indexed,
        torch.unsqueeze: _unsqueezed,
        _T.unsqueeze: _unsqueezed,
        torch.unbind: _unbound,
        _T.unbind: _unbound,
        torch.permute: _permuted,
        _T.permute: _permuted,
        F.scaled_dot_product_attention: _attention,
    }
    table.update(dict.fromkeys((_T.view, _T.reshape, torch.reshape), _reshaped))
    table.update(dict.fromkeys((_T.detach, _T.contiguous, getter("data")), same))
    casts = (_T.to, _T.float, _T.half, _T.bfloat16, _T.double, _T.type)
    table.update(dict.fromkeys((*unary(), *casts), _each))
    table.update(dict.fromkeys(binary(), elementwise))
    table.update(dict.fromkeys((_T.__iadd__, _T.add_), _added))
    table.update(dict.fromkeys((torch.matmul, torch.mm, _T.matmul, _T.mm, _T.__matmul__), _matmul))
    return table
