"""What a closure returns: the loss, as one real number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .arithmetic import Number, quotient, total
from .options import plain
from .sharded import whole

GRID, FINE_GRID = 2.0**-30, 2.0**-64
"""Of the two float64 sums of a :class:`LossSum`, the distances between the numbers that they may
be. Sums of up to 2**20 samples and 2**23 in size are then exact, in any order and any parts."""


@dataclass(frozen=True)
class LossSum:
    """The losses of some samples as a sum and a number of samples, which a closure may return in
    the place of their mean.

    The sum is exact. So it is the same whatever the order of the samples, and however they were
    divided among forwards (add the sums with ``+``) or ranks (:mod:`adamezo.distributed`); of a
    mean in float32 that is not so.
    """

    coarse: Tensor
    """float64: the sum of the losses, each rounded to multiples of GRID."""
    fine: Tensor
    """float64: the sum of what those roundings have left, in multiples of FINE_GRID."""
    weight: Tensor
    """float64: how many samples there are, or the sum of their weights."""

    @classmethod
    def of(cls, losses: Tensor, weights: Tensor | None = None) -> LossSum:
        """The sum of the losses of samples.

        Args:
            losses: one for each sample, or token, of any shape and floating-point type. Numbers up
                to 2**22; what is below FINE_GRID / 2 is lost.
            weights: of that shape, such as a mask that leaves out padding, whose losses may be
                anything but must be finite. None weighs all alike.
        """
        values = losses.detach().double()
        if weights is not None:
            if weights.shape != losses.shape:
                raise ValueError(
                    f"expected weights of the losses' shape {tuple(losses.shape)}, got "
                    f"{tuple(weights.shape)}"
                )
            weights = weights.detach().double()
            values = values * weights
        coarse = (values / GRID).round() * GRID
        fine = ((values - coarse) / FINE_GRID).round() * FINE_GRID
        count = values.new_tensor(float(values.numel())) if weights is None else weights.sum()
        return cls(coarse.sum(), fine.sum(), count)

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(
            self.coarse + other.coarse, self.fine + other.fine, self.weight + other.weight
        )

    @property
    def loss(self) -> Tensor:
        """The mean, a float64 scalar."""
        return (self.coarse + self.fine) / self.weight


Closure = Callable[[], Any]
"""Evaluates the model without gradients and returns the loss (:func:`checked_loss`)."""


Result = Tensor | float | LossSum
"""What an evaluation gives."""


def checked_loss(result: Any) -> Result:
    """The loss that a closure returned, if it is one real number.

    Args:
        result: a scalar tensor, or a number of Python's or numpy's; or a mapping or an object that
            has one as its ``loss``, as the outputs of transformers' models have; or a
            :class:`LossSum`, which is returned as it is.

    Raises:
        TypeError, ValueError: anything else, with what to return.
    """
    if isinstance(result, LossSum):
        _checked_tensor(result.loss)
        return result
    loss = _loss_in(result)
    if isinstance(loss, Tensor):
        return _checked_tensor(whole(loss))
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


def numbers(results: Sequence[Result]) -> list[float]:
    """All losses as numbers. Those on a GPU are waited for and copied once, and not one by one."""
    losses = [r.loss if isinstance(r, LossSum) else r for r in results]
    tensors = [loss for loss in losses if isinstance(loss, Tensor) and _costs_a_wait(loss)]
    if len(tensors) == len(losses) and len({t.device for t in tensors}) == 1:
        return torch.stack([t.double().reshape(()) for t in tensors]).tolist()
    return [float(loss) for loss in losses]


def _costs_a_wait(tensor: Tensor) -> bool:
    return not tensor.is_cpu


def mean_loss(losses: Sequence[Number], results: Sequence[Result]) -> Tensor:
    """What a step returns: of the kind that the last of its results has."""
    mean, last = quotient(total(losses), len(losses)), results[-1] if results else None
    last = last.loss if isinstance(last, LossSum) else last
    if isinstance(mean, Tensor):
        return mean.to(last.dtype) if isinstance(last, Tensor) else mean
    like = last if isinstance(last, Tensor) else None
    return torch.tensor(
        mean,
        dtype=None if like is None else like.dtype,
        device=None if like is None else like.device,
    )
