"""Products with perturbed weights: those with displaced copies of them, within rounding."""

from __future__ import annotations

import pytest
import torch

from adamezo_kernels import PhiloxState, Plan, perturb_, perturbed, perturbed_linear
from helpers.backends import BACKENDS
from helpers.operations import TYPES
from helpers.products import assert_is_the_product, inputs

A, B = PhiloxState(0x9E3779B97F4A7C15, 7), PhiloxState(0x9E3779B97F4A7C15, 2**32 - 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distribution", ["exact", "rademacher", "lowrank:2"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_product_with_a_displaced_copy(backend, distribution, dtype, monkeypatch):
    monkeypatch.setattr(perturbed, "BLOCK", 200)  # rows of 37 elements: blocks of five
    x, weight, bias = inputs(6, 23, 37, dtype)
    before = weight.clone()
    for states, scales, biases in (
        (A, 0.05, None),
        (A, [0.05, -0.05], bias),
        ([A, B, A], [0.05, -0.2, 0.0], torch.stack([bias, -bias, bias * 2])),
        ([B, A], 0.05, bias),
    ):
        kind = dict(parameter=9, distribution=distribution, backend=backend)
        got = perturbed_linear(x, weight, states, scales, bias=biases, **kind)
        assert_is_the_product(got, x, weight, states, scales, biases, **kind)
    assert torch.equal(weight, before)


def test_shapes_and_strides():
    """Leading sizes stay; rows of a larger matrix, a transposed one and blocks without rows."""
    x, weight, _ = inputs(12, 8, 16, torch.float32)
    flat = perturbed_linear(x, weight, A, [0.1, -0.1], parameter=1)
    assert torch.equal(
        perturbed_linear(x.view(2, 3, 2, 16), weight, A, [0.1, -0.1], parameter=1),
        flat.view(2, 3, 2, 8),
    )
    for strided in (torch.empty(8, 20)[:, 2:18].copy_(weight), weight.t().contiguous().t()):
        got = perturbed_linear(x, strided, A, [0.1, -0.1], parameter=1)
        assert_is_the_product(got, x, weight, A, [0.1, -0.1], None, parameter=1)
    assert perturbed_linear(x[:0], weight, A, [0.1, -0.1], parameter=1).shape == (0, 8)
    assert perturbed_linear(x[:1, :0], weight[:, :0], A, 0.1, parameter=1).tolist() == [[0.0] * 8]
    assert perturbed_linear(x[0], weight, A, 0.1, parameter=1).shape == (8,)


def test_nothing_is_recorded_for_gradients():
    x, weight, _ = inputs(2, 3, 4, torch.float32)
    y = perturbed_linear(x.requires_grad_(), torch.nn.Parameter(weight), A, 0.1, parameter=0)
    assert not y.requires_grad


def test_what_does_not_fit_is_refused():
    x, weight, bias = inputs(6, 3, 4, torch.float32)
    for arguments, more, error, message in (
        ((x, weight[:, :3], A, 1.0), {}, ValueError, r"x of shape \(\.\.\., in\).*got \(6, 4\)"),
        ((x, weight[0], A, 1.0), {}, ValueError, r"weight of shape \(out, in\).*and \(4,\)"),
        ((x.half(), weight, A, 1.0), {}, TypeError, "float16 on cpu and torch.float32 on cpu"),
        ((x, weight, A, [1.0] * 4), {}, ValueError, "6 rows, which are not 4 equal blocks"),
        ((x, weight, [A, B], [1.0] * 3), {}, ValueError, "got 2 states for 3 perturbations"),
        ((x, weight, [], [1.0] * 3), {}, ValueError, "got 0 states for 3 perturbations"),
        ((x, weight, A, float("inf")), {}, ValueError, "scale must be finite"),
        ((x, weight, A._replace(offset=4), 1.0), {}, ValueError, "without offset, got offset 4"),
        ((x, weight, A, 1.0), {"bias": bias[:2]}, ValueError, r"\(3,\) or \(1, 3\), got \(2,\)"),
        ((x, weight, A, 1.0), {"bias": bias.half()}, TypeError, "bias of the weight's type"),
        ((x, weight, A, 1.0), {"distribution": "fats"}, ValueError, "distribution must be one of"),
        ((x.double(), weight.double(), A, 1.0), {}, TypeError, "weight has dtype torch.float64"),
    ):
        with pytest.raises(error, match=message):
            perturbed_linear(*arguments, **{"parameter": 0, **more})


def test_the_weights_are_those_of_perturb():
    """To the last bit: x is the identity, and no sum has more than one number that is not 0."""
    _, weight, _ = inputs(1, 9, 21, torch.bfloat16)
    y = perturbed_linear(torch.eye(21).bfloat16(), weight, B, 0.3, parameter=5)
    copy = weight.clone()
    perturb_(Plan([copy], parameters=[5]), B, 0.3)
    assert torch.equal(y, copy.t())
