"""float32 arithmetic on torch's tensors, each operation rounded once, correctly on every device.

An operand is a float32 tensor or a Python float that float32 can hold; one of them is a tensor.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

Value = float | Tensor

FLOAT32_MAX = 3.4028234663852886e38


def mul(a: Value, b: Value) -> Tensor:
    return cast(Tensor, a * b)


def add(a: Value, b: Value) -> Tensor:
    return cast(Tensor, a + b)


def larger(a: Tensor, b: Value) -> Tensor:
    """``a`` where it is above ``b``, else ``b``: so ``b`` where either is a NaN."""
    b = b if isinstance(b, Tensor) else torch.full_like(a, b)
    return torch.where(a > b, a, b)


def smaller(a: Tensor, b: Value) -> Tensor:
    b = b if isinstance(b, Tensor) else torch.full_like(a, b)
    return torch.where(a < b, a, b)


# sqrt and / of float32 computed in float64 and rounded again are correctly rounded, as
# 53 >= 2 * 24 + 2 (Figueroa, 1995), on any device and whatever its float32 mode is.


def sqrt(a: Tensor) -> Tensor:
    return a.double().sqrt().float()


def div(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() / b.double()).float()


def to_float32(x: float) -> float:
    """The float32 nearest to ``x``, as a Python float."""
    return torch.tensor(x, dtype=torch.float32).item()


def _double(x: Value) -> Value:
    return x.double() if isinstance(x, Tensor) else x


def fma(a: Value, b: Value, c: Value) -> Tensor:
    """``a * b + c`` of float32 values, rounded once to float32: exact everywhere.

    The result is broadcast.

    A product of two float32 is exact in float64 (24 + 24 <= 53 bits, exponents far inside its
    range), so only the sum rounds, once to 53 bits and then again to 24. Both roundings are
    monotonic, hence the second can go wrong only if the first moved the sum *onto* a boundary
    between two float32: a point half-way between two neighbours, whose low 29 bits in float64 are
    exactly 0x10000000. Below 2**-126 the neighbours of float32 lie further apart and the boundary
    has other bits. Elements of either kind are rare; they are computed again with the first
    rounding to odd, which keeps the sum off every boundary it was not on before and so makes the
    second rounding right (Boldo and Melquiond, IEEE Trans. Computers 57(4), 2008).

    This assumes that the process does not flush subnormals to zero, and that torch runs the
    multiply and the add as two operations: do not put it through torch.compile.
    """
    product = _double(a) * _double(b)
    addend = _double(c)
    total = cast(Tensor, product + addend)
    bits = total.view(torch.int64)
    doubtful = ((bits & 0x1FFFFFFF) == 0x10000000) | ((total.abs() < 2.0**-126) & (total != 0))
    result = total.float()
    if doubtful.any():
        p, q = (x if isinstance(x, Tensor) else total.new_tensor(x) for x in (product, addend))
        p, q = (x.expand(total.shape)[doubtful] for x in (p, q))
        result[doubtful] = _add_to_odd(p, q).float()
    return result


def _add_to_odd(p: Tensor, q: Tensor) -> Tensor:
    """``p + q`` in float64, rounded to odd: to the neighbour whose last bit is 1 if inexact."""
    total = p + q
    # Knuth's TwoSum: total + error == p + q exactly.
    q_part = total - p
    error = (p - (total - q_part)) + (q - q_part)
    bits = total.view(torch.int64)
    # Of the two float64 around an inexact sum just one is odd. If rounding took the even one, the
    # other is next to it on the side of the error. (Both comparisons are false for NaN, which is
    # what TwoSum gives for infinities.)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    wrong = ((error > 0) | (error < 0)) & ((bits & 1) == 0)
    return torch.where(wrong, bits + step, bits).view(torch.float64)
