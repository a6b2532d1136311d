"""Products in bfloat16 on processors without instructions for them (benchmarks/products.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.products import RoundedInFloat32, in_bfloat16


def differences(made, native):
    """In units of bfloat16's rounding at the size of the largest number, as cancellation leaves
    the error of large partial sums in small results."""
    assert made.dtype == native.dtype == torch.bfloat16
    return (made.float() - native.float()).abs().max() / native.float().abs().max() * 2**8


@pytest.mark.parametrize("bias", [True, False])
def test_they_are_those_of_autocast_but_for_the_order_of_sums(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(384, 256, bias=bias), torch.randn(5, 7, 384)
    with torch.autocast("cpu", torch.bfloat16):
        native = layer(x)
        with RoundedInFloat32():
            made = layer(x)
    assert differences(made, native) <= 1  # the sums round to the same number, or the next one
    assert (made == native).float().mean() > 0.9
    assert not torch.equal(made, layer(x).bfloat16())  # which has rounded no factor


def test_gradients_are_too():
    torch.manual_seed(0)
    layer, x = nn.Linear(384, 256), torch.randn(7, 384)
    found = []
    for mode in (torch.no_grad, RoundedInFloat32):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), mode(), torch.enable_grad():
            layer(x).square().mean().backward()
        found.append(layer.weight.grad.bfloat16())
    assert differences(*found) <= 2  # of a product, and of what it is of


def test_where_it_is_switched_off_nothing_is_rounded(monkeypatch):
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    monkeypatch.setattr("benchmarks.products.without_instructions", lambda: True)
    with in_bfloat16():
        assert layer(x).dtype == torch.bfloat16
    with in_bfloat16(enabled=False):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert layer(x).dtype == torch.float32
