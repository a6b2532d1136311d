"""Arithmetic with the same bits for floats and for float64 tensors on a device.

A method computes its numbers from losses in one text: on the host from floats, and with
``capturable`` from scalar tensors, which are never read (``if``, ``min``, ``float``), as that would
wait for the device. Sums, differences, products and comparisons have the same text anyway, and
``|`` of comparisons. Here are the other operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Number = Any
"""A float, or with ``capturable`` a float64 scalar tensor on the device."""

# A number whose square float32 cannot hold is as useless as an infinite one.
_HUGE = 1e19


def quotient(a: Number, b: Number) -> Number:
    """``a / b``. Of a tensor and a float torch makes a product with a reciprocal, on a GPU at
    least, which has other bits."""
    if isinstance(a, Tensor) and not isinstance(b, Tensor):
        b = torch.full_like(a, b)
    elif isinstance(b, Tensor) and not isinstance(a, Tensor):
        a = torch.full_like(b, a)
    return a / b


def two_sided(loss_plus: Number, loss_minus: Number, zo_eps: float) -> Number:
    """The projected gradient: (L(theta + zo_eps z) - L(theta - zo_eps z)) / (2 zo_eps)."""
    return quotient(loss_plus - loss_minus, 2 * zo_eps)


def square_root(x: Number) -> Number:
    """Correctly rounded, and so the same on every machine. torch's own is not on a CPU of Intel's,
    where it is MKL's and off by one in the last place for one number in 150."""
    if isinstance(x, Tensor):
        return x.clone().apply_(math.sqrt) if x.is_cpu else x.sqrt()
    return math.sqrt(x)


def magnitude(x: Number) -> Number:
    return x.abs() if isinstance(x, Tensor) else abs(x)


def total(values: Iterable[Number]) -> Number:
    """Their sum from first to last. ``sum`` of floats is another one from Python 3.12 on, and
    torch's has an order of its own."""
    result = 0.0
    for value in values:
        result = result + value
    return result


def alike(values: Sequence[Number]) -> Any:
    """Whether all are equal: a bool, or a bool tensor."""
    result: Any = True
    for value in values[1:]:
        result = result & (value == values[0])
    return result


def where(condition: Any, a: float, b: Number) -> Number:
    """``a`` if the condition holds, else ``b``; of tensors without a look at it."""
    if isinstance(b, Tensor):
        return b.masked_fill(condition, a)
    return a if condition else b


def usable(numbers: Sequence[Number]) -> Any:
    """Whether all are finite and small enough for an update: a bool, or a bool tensor."""
    if isinstance(numbers[0], Tensor):
        return (torch.stack([*numbers]).abs() < _HUGE).all()
    return all(abs(number) < _HUGE for number in numbers)


def steps_to_one(beta: float) -> int:
    """A number of steps t from which on ``1 - beta**t`` is 1 in float64."""
    return 1 if beta == 0 else 2 + math.floor(-54 * math.log(2) / math.log(beta))
