"""Triton's products with perturbed weights in Triton's interpreter: those with displaced copies.

Not collected by itself, like triton_interpreted.py.
By hand: TRITON_INTERPRET=1 python -m pytest tests/gpu/triton_products_interpreted.py
"""

from __future__ import annotations

import pytest
import torch

from adamezo_kernels import PhiloxState, Plan, perturb_, perturbed_linear
from adamezo_kernels.backends import products, triton
from helpers.operations import TYPES
from helpers.products import assert_is_the_product, inputs

pytestmark = pytest.mark.skipif(
    not triton.availability()[0], reason=f"no interpreter: {triton.availability()[1]}"
)

A, B = PhiloxState(0x9E3779B97F4A7C15, 7), PhiloxState(2**64 - 5, 2**32 - 1)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Each launch's number of programs and constants."""
    seen = []
    start = products.start

    def counted(grid, *arguments, **constants):
        seen.append((grid[0], constants))
        start(grid, *arguments, **constants)

    monkeypatch.setattr(products, "start", counted)
    return seen


def product(x, weight, states, scales, *, by="triton", **more):
    return perturbed_linear(x, weight, states, scales, backend=by, **more)


@pytest.mark.parametrize(
    ("dtype", "distribution", "inner"),
    [
        (torch.float32, "exact", 36),
        (torch.float32, "rademacher", 33),
        (torch.bfloat16, "exact", 37),
        (torch.bfloat16, "rademacher", 132),
        (torch.float16, "exact", 64),
        (torch.float16, "rademacher", 40),
    ],
    ids=str,
)
def test_the_product_with_a_displaced_copy(launches, dtype, distribution, inner):
    """Rows and columns beyond a tile, of x, y and W; one perturbation and several of two keys."""
    kind = {"parameter": 2**24 - 1, "distribution": distribution}
    for rows, out, states, scales, biased in (
        (3, 66, A, 0.05, False),
        (36, 5, [A, B], [0.05, -0.2], True),
    ):
        x, weight, bias = inputs(rows, out, inner, dtype)
        before = weight.clone()
        biases = torch.stack([bias, -bias]) if biased else None
        launches.clear()
        got = product(x, weight, states, scales, bias=biases, **kind)
        assert len(launches) == 1
        assert launches[0][0] == 2  # two tiles of W, or one for each perturbation
        assert launches[0][1]["ALIGNED"] == (inner % 4 == 0)
        assert torch.equal(weight, before)
        assert_is_the_product(got, x, weight, states, scales, biases, backend="reference", **kind)


@pytest.mark.parametrize("distribution", ["exact", "rademacher"])
@pytest.mark.parametrize("inner", [132, 35])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_weights_are_those_of_perturb(dtype, inner, distribution):
    """To the last bit: every row of x picks one column of W."""
    _, weight, _ = inputs(1, 9, inner, dtype)
    columns = torch.tensor([0, 1, 2, 3, 31, 32, 33, 34, inner - 4, inner - 3, inner - 2, inner - 1])
    x = torch.nn.functional.one_hot(columns, inner).to(dtype)
    y = product(x, weight, B, 0.3, parameter=5, distribution=distribution)
    copy = weight.clone()
    perturb_(Plan([copy], parameters=[5]), B, 0.3, distribution=distribution, backend="reference")
    assert torch.equal(y, copy.t()[columns])


def test_nothing_comes_from_behind_the_end():
    """Neither columns of W beyond the last, at a scale that overflows, nor rows of x."""
    x, weight, _ = inputs(2, 3, 5, torch.float32)
    x /= 64  # so that no partial sum overflows, in whatever order a CPU adds
    weight.zero_()
    store = torch.full((4, 8), float("nan"))
    store[:3, :5] = weight
    y = product(x, store[:3, :5], A, 3e38, parameter=0, distribution="rademacher")
    assert not y.isnan().any()
    x[0] = float("inf")
    y = product(x, weight, A, 1.0, parameter=0)
    assert y[1].isfinite().all()
    assert not y[0].isfinite().any()


def test_a_sum_is_in_float32():
    """Of 16-bit numbers too, whose own sums would stay 2048."""
    weight = torch.tensor([[2048.0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]], dtype=torch.float16)
    y = product(torch.ones(1, 8, dtype=torch.float16), weight, A, 0.0, parameter=0)
    assert y.tolist() == [[2050.0]]


def test_what_it_leaves_to_blocks(launches):
    """Columns that are apart in memory, low-rank directions, and tensors without elements."""
    x, weight, _ = inputs(4, 6, 8, torch.float32)
    apart = weight.t().contiguous().t()
    for w, distribution in ((apart, "exact"), (weight, "lowrank")):
        got = product(x, w, A, 0.1, parameter=1, distribution=distribution)
        assert_is_the_product(
            got, x, weight, A, 0.1, None, parameter=1, distribution=distribution,
            backend="reference",
        )  # fmt: skip
    assert product(x[:0], weight, A, 0.1, parameter=1).shape == (0, 6)
    assert product(x[:, :0], weight[:, :0], A, 0.1, parameter=1).tolist() == [[0.0] * 6] * 4
    assert not launches
    # Rows with others between them are taken as they are; nothing named is not Triton on a CPU.
    wide = torch.zeros(6, 12)[:, 2:10].copy_(weight)
    got = product(x, wide, A, 0.1, parameter=1)
    assert_is_the_product(got, x, weight, A, 0.1, None, parameter=1, backend="reference")
    assert len(launches) == 1
    product(x, weight, A, 0.1, parameter=1, by=None)
    assert len(launches) == 1
