"""What a forward of perturbed weights knows, and helpers for the functions that are served."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.overrides import resolve_name

from adamezo_kernels import Direction, Terms

if TYPE_CHECKING:
    from .matrices import StandIn

_T = torch.Tensor


class Kind(Protocol):
    """How functions of a matrix W + c Z are computed, for one kind of directions."""

    vectors: str
    """The distribution of the directions of vectors."""

    def begin(self, directions: Sequence[Direction]) -> None:
        """Forwards from now on have these directions."""

    def forget(self) -> None:
        """The next step has directions of its own."""

    @property
    def bytes(self) -> int:
        """The memory that is kept for directions and displaced weights."""

    def product(
        self, function: Any, x: Tensor, matrix: StandIn, compute: Callable[..., Tensor],
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``compute(x, W, bias)``, which is x W^T and the bias, of each block of the perturbed
        matrix and bias. ``function`` is what the model has called."""

    def convolution(
        self, x: Tensor, matrix: StandIn, compute: Callable[..., Tensor], bias: Tensor | None
    ) -> Tensor:
        """The same of a convolution."""

    def embedding(self, ids: Tensor, matrix: StandIn, shared: bool) -> Tensor:
        """Rows of the perturbed matrix, for indices that are those of a batch; or that all blocks
        have in common, with a first dimension of the blocks."""

    def whole(self, matrix: StandIn) -> Tensor:
        """The perturbed matrix of each block, of shape (blocks, *shape)."""


@dataclass(frozen=True)
class Blocks:
    """The perturbations of one forward: of each block of rows of the batch."""

    kind: Kind
    directions: list[Terms]
    which: list[int]
    """For each block, which direction it has."""
    scales: Tensor
    """float32 of shape (blocks,), on the host."""
    working: Callable[[], AbstractContextManager[None]]
    """A context in which weights are read in order to be corrected."""
    rows: set[int]
    """How many rows the closure's batches have."""
    parts: list[int]
    """For each block, which part of the closure's inputs it has: those of one part are the same."""
    types: set[torch.dtype]
    """The types of what was corrected, as autocast may compute in others than the weights'."""
    refuse: Callable[[str], NoReturn]

    @property
    def count(self) -> int:
        return len(self.which)


class NotServed(Exception):
    """A function in this form is not served, and needs the perturbed weight itself."""


def refused(blocks: Blocks, name: str, function: Callable[..., Any], why: str = "") -> NoReturn:
    """Raises NotServed, or in a batch, in which there is no one perturbed weight, refuses."""
    if blocks.count == 1:
        raise NotServed
    blocks.refuse(
        f"{name} is read by {name_of(function)}{why}, which perturbation='regenerated' does not "
        f"serve in a batch of {blocks.count} perturbations: pass a closure that is not batched, or "
        "take perturbation='out_of_place'"
    )


def writes(function: Callable[..., Any], kwargs: Any) -> bool:
    """Whether a function writes to a tensor that it is given."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith("__i") or kwargs.get("out") is not None


def name_of(function: Callable[..., Any]) -> str:
    return resolve_name(function) or getattr(function, "__name__", str(function))


def uneven(rows: int, blocks: Blocks) -> str:
    return f" on {rows} rows, which are no batch of {blocks.count} blocks"


def leaves(args: Any, kwargs: Any) -> list[Any]:
    found: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        else:
            found.append(value)

    add(args)
    add(list(kwargs.values()))
    return found


def bound(args: Any, kwargs: Any, names: Sequence[str]) -> list[Any]:
    """The arguments by their names; None for those not given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def same(function: Any, args: Any, kwargs: Any) -> Any:
    return args[0]


def getter(name: str) -> Any:
    """What torch calls where an attribute of a tensor is read."""
    return getattr(_T, name).__get__


def unary() -> list[Any]:
    names = ("neg", "exp", "abs", "sqrt", "rsqrt", "square", "tanh", "sigmoid", "reciprocal", "log")
    return [*(getattr(of, name) for of in (torch, _T) for name in names), _T.__neg__]


def binary() -> list[Any]:
    names = ("add", "sub", "mul", "div", "true_divide", "multiply", "subtract")
    found = [getattr(of, name) for of in (torch, _T) for name in names]
    found += [
        getattr(_T, f"__{side}{name}__") for side in ("", "r") for name in ("add", "sub", "mul")
    ]
    return [*found, _T.__truediv__, _T.__rtruediv__, torch.rsub, _T.pow, torch.pow, _T.__pow__]


@functools.cache
def properties() -> frozenset[Any]:
    """Functions that read no element."""
    names = (
        "shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "is_meta", "is_quantized",
        "layout", "requires_grad", "is_sparse", "is_mps", "is_nested", "is_leaf", "grad", "grad_fn",
        "itemsize", "is_xpu", "is_mkldnn", "nbytes", "_version",
    )  # fmt: skip
    methods = (
        "size", "dim", "numel", "nelement", "stride", "element_size", "is_floating_point",
        "__len__", "is_complex", "is_contiguous", "is_inference", "get_device", "ndimension",
        "storage_offset", "__hash__", "requires_grad_", "is_signed",
    )  # fmt: skip
    found = [getter(name) for name in names if hasattr(_T, name)]
    found += [getattr(_T, name) for name in methods]
    return frozenset([*found, torch.numel, torch.is_floating_point, torch.is_complex])
