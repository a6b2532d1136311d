"""What a closure returns: the loss, as one real number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .arithmetic import Number, quotient, total
from .options import plain

Closure = Callable[[], Any]
"""Evaluates the model without gradients and returns the loss (:func:`checked_loss`)."""


def checked_loss(result: Any) -> Tensor | float:
    """The loss that a closure returned, if it is one real number.

    Args:
        result: a scalar tensor, or a number of Python's or numpy's; or a mapping or an object that
            has one as its ``loss``, as the outputs of transformers' models have.

    Raises:
        TypeError, ValueError: anything else, with what to return.
    """
    loss = _loss_in(result)
    if isinstance(loss, Tensor):
        return _checked_tensor(loss)
    loss = plain(loss)
    if isinstance(loss, bool) or not isinstance(loss, (int, float)):
        raise TypeError(
            f"{_EXPECTED}, got {type(loss).__name__}"
            + (": does it lack a `return`?" if result is None else "")
        )
    try:
        return float(loss)
    except OverflowError:
        raise ValueError(f"{_EXPECTED}, got an int beyond float64") from None


_EXPECTED = (
    "the closure must return the loss as one real number: a scalar tensor, a number, or a dict or "
    "output of a model with such a `loss`"
)


def _loss_in(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result
    kind = type(result).__name__
    if isinstance(result, Mapping):
        loss = result.get("loss")
    elif hasattr(result, "loss") and not callable(result):
        loss = result.loss
    else:
        return result
    if loss is None:
        raise ValueError(
            f"{_EXPECTED}, got a {kind} without a loss: models of transformers compute it if they "
            "are given `labels`"
        )
    return loss


def _checked_tensor(loss: Tensor) -> Tensor:
    def refuse(error: type[Exception], what: str, remedy: str) -> NoReturn:
        raise error(f"{_EXPECTED}, got a tensor {what}: {remedy}")

    if loss.is_nested or loss.layout != torch.strided:
        kind = "that is nested" if loss.is_nested else f"of layout {loss.layout}"
        refuse(ValueError, kind, "return a dense one (`to_dense()`, or a sum)")
    if loss.numel() != 1 or loss.is_complex():
        refuse(
            ValueError,
            f"of shape {tuple(loss.shape)} and dtype {loss.dtype}",
            "reduce it, for example by `mean()`",
        )
    eight_bits = loss.is_floating_point() and loss.dtype.itemsize == 1
    if loss.dtype == torch.bool or loss.is_quantized or eight_bits:
        refuse(TypeError, f"of dtype {loss.dtype}", "convert it by `float()` before it is reduced")
    if loss.is_meta:
        refuse(ValueError, "on the meta device", "it has no value there")
    # Of its own memory: a closure may return the same tensor again, with another value.
    loss = loss.detach().clone()
    return loss if loss.is_floating_point() else loss.double()


def numbers(losses: Sequence[Tensor | float]) -> list[float]:
    """All losses as numbers. Those on a GPU are waited for and copied once, and not one by one."""
    tensors = [loss for loss in losses if isinstance(loss, Tensor) and _costs_a_wait(loss)]
    if len(tensors) == len(losses) and len({t.device for t in tensors}) == 1:
        return torch.stack([t.double().reshape(()) for t in tensors]).tolist()
    return [float(loss) for loss in losses]


def _costs_a_wait(tensor: Tensor) -> bool:
    return not tensor.is_cpu


def mean_loss(losses: Sequence[Number], results: Sequence[Tensor | float]) -> Tensor:
    """What a step returns: of the kind that the last of its results has."""
    mean, last = quotient(total(losses), len(losses)), results[-1]
    if isinstance(mean, Tensor):
        return mean.to(last.dtype) if isinstance(last, Tensor) else mean
    like = last if isinstance(last, Tensor) else None
    return torch.tensor(
        mean,
        dtype=None if like is None else like.dtype,
        device=None if like is None else like.device,
    )
