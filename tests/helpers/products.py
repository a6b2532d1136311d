"""Products with displaced weights: inputs, and the bound on what may come out."""

from __future__ import annotations

import torch
from torch import Tensor

from adamezo_kernels import PhiloxState, Plan, perturb_


def inputs(rows: int, out: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and a bias of these sizes."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return normal(rows, columns), normal(out, columns), normal(out)


def assert_is_the_product(got, x, weight, states, scales, bias, *, parameter, **kind) -> None:
    """``got`` is x (W + c Z)^T + bias with the displaced W of ``perturb_``, up to rounding.

    With u = 2^-24, a float32 sum of n products, in any order and with or without fma, is within
    n u / (1 - n u) of the sum of their magnitudes (Higham, Accuracy and Stability of Numerical
    Algorithms, 3.1); a bias is one more number. A store rounds to the type of x by at most half a
    unit in the last place, and a backend may make one before it adds the bias and one after.
    """
    count = max(len(v) if isinstance(v, list) else 1 for v in (states, scales))
    blocks = x.reshape(count, -1, x.shape[-1]).double()
    y, size, stored = [], [], []
    for n in range(count):
        state = states if isinstance(states, PhiloxState) else states[n]
        scale = scales[n] if isinstance(scales, list) else scales
        copy = weight.detach().clone()
        perturb_(Plan([copy], parameters=[parameter]), state, scale, **kind)
        w, product = copy.double(), blocks[n] @ copy.double().t()
        own = torch.zeros(len(w)) if bias is None else bias[n] if bias.dim() == 2 else bias
        y.append(product + own.double())
        size.append(blocks[n].abs() @ w.t().abs() + own.double().abs())
        stored.append(y[n].abs() + (0 if bias is None else product.abs()))
    summed = (x.shape[-1] + 1) * 2.0**-24
    summed /= 1 - summed
    half = torch.finfo(x.dtype).eps / 2
    bound = (1 + 2 * half) * summed * torch.cat(size) + half * (1 + half) * torch.cat(stored)
    off = (got.reshape(bound.shape).double() - torch.cat(y)).abs()
    assert (off <= bound).all(), (off / bound).max()
