"""Tensor trains compute what their dense product computes, and what tensorly says that this is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from adamezo.adapters import TensorTrainAdapter, TensorTrainLinear, factorise

CASES = [
    # in, out, rank, dimensions: as in Llama-2-7B, uneven ones, one core a side, ranks of each bond
    (4096, 64, 5, {}),
    (64, 576, 5, {}),
    (30, 7, 3, {}),
    (12, 10, 2, {"in_dims": (12,), "out_dims": (10,)}),
    (24, 36, (2, 3, 4, 5, 6), {"in_dims": (2, 3, 4), "out_dims": (6, 3, 2)}),
    (16, 9, 1, {"in_dims": (2, 2, 2, 2), "out_dims": (3, 3)}),
]


def draw(case, **options):
    inputs, outputs, rank, dims = case
    generator = torch.Generator().manual_seed(3)
    made = TensorTrainLinear(inputs, outputs, rank, generator=generator, **dims, **options)
    if made.bias is not None:
        nn.init.normal_(made.bias, generator=generator)
    return made


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_that_of_tensorly(case):
    """In float64: both sum the same terms, fewer than 2^12 for an element, in another order."""
    from tensorly import tt_tensor

    train = draw(case, dtype=torch.float64)
    whole = tt_tensor.tt_to_tensor([core.detach().numpy() for core in train.cores])
    assert whole.shape == (*train.in_dims, *train.out_dims)
    expected = torch.as_tensor(whole).reshape(train.in_features, train.out_features).T
    torch.testing.assert_close(
        train.dense(), expected, rtol=0, atol=1e-12 * float(expected.abs().max())
    )


@pytest.mark.parametrize("case", CASES[2:])
def test_an_element_is_the_product_of_the_cores_matrices(case):
    """The definition, written again: the first index of a side is the most significant one."""
    train = draw(case, dtype=torch.float64)
    dims, dense = train.in_dims + train.out_dims, train.dense()
    for index in itertools.islice(itertools.product(*map(range, dims)), 0, None, 37):
        product = torch.eye(1, dtype=torch.float64)
        for core, i in zip(train.cores, index, strict=True):
            product = product @ core[:, i]
        row = column = 0
        for d, i in zip(train.in_dims, index, strict=False):
            row = row * d + i
        for d, i in zip(train.out_dims, index[len(train.in_dims) :], strict=True):
            column = column * d + i
        torch.testing.assert_close(dense[column, row], product[0, 0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Relative to the largest element. The longest sums have 4,096 terms, whose rounding errors add
    # up to some sqrt(4096) = 64 units of 2^-24 (4e-6), and gradients pass through two of them. In
    # float64 the same number of units is 1e-14.
    [(torch.float64, 1e-12), (torch.float32, 1e-5)],
)
def test_outputs_and_gradients_are_those_of_the_dense_product(case, dtype, tolerance):
    train = draw(case, dtype=torch.float64).to(dtype)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, train.in_features, generator=generator, dtype=torch.float64)
    target = torch.randn(2, 3, train.out_features, generator=generator, dtype=torch.float64)

    def loss_and_gradients(module, of, cores):
        inputs = x.to(of).requires_grad_()
        output = module(inputs)
        loss = (output - target.to(of)).square().mean()
        return output, loss, torch.autograd.grad(loss, [inputs, *cores])

    ours = loss_and_gradients(train, dtype, [*train.cores, train.bias])
    reference = draw(case, dtype=torch.float64)

    def dense(inputs):
        return nn.functional.linear(inputs, reference.dense(), reference.bias)

    cores = [*reference.cores, reference.bias]
    output, loss, gradients = loss_and_gradients(dense, torch.float64, cores)
    pairs = [(ours[0], output), (ours[1], loss), *zip(ours[2], gradients, strict=True)]
    for got, expected in pairs:
        size = float(expected.detach().abs().max())
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * size)


def test_losses_and_gradients_in_float32_are_those_of_the_dense_product_to_1e_6():
    """At a size of the main job, relative to the loss and to the largest element of a gradient.
    Sums have 576 terms, which is some sqrt(576) = 24 units of 2^-24, 1.4e-6, where all errors are
    of the largest size; they are smaller on average, and this draw is always the same."""
    train = draw((576, 64, 5, {}))
    x = torch.randn(16, 576, generator=torch.Generator().manual_seed(4))

    def of(weight, bias):
        loss = nn.functional.linear(x.to(weight.dtype), weight, bias).square().mean()
        return loss, torch.autograd.grad(loss, [*train.cores, train.bias])

    loss = train(x).square().mean()
    gradients = torch.autograd.grad(loss, [*train.cores, train.bias])
    expected, expected_gradients = of(train.dense(), train.bias)
    exact, _ = of(train.double().dense(), train.bias)
    assert abs(float(loss) - float(expected)) <= 1e-6 * float(expected)
    assert abs(float(loss) - float(exact)) <= 1e-6 * float(exact)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert float((got - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


def test_numbers_of_weights_at_rank_5_are_those_of_the_released_code():
    linear = TensorTrainLinear(4096, 64)
    assert linear.in_dims == (16, 16, 16)
    assert linear.out_dims == (4, 4, 4)
    assert sum(core.numel() for core in linear.cores) == 1_100
    adapter = TensorTrainAdapter(4096)
    assert sum(p.numel() for p in adapter.parameters()) == 6_360


@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 64), (64, 576), (30, 7)])
def test_the_product_begins_with_the_published_standard_deviation(inputs, outputs):
    """Mean of squares over 400 draws. A single one varies by much, as a product of six normals has
    heavy tails: a factor of two and more between draws, so 400 of them tell it to 1.3 or so."""
    generator = torch.Generator().manual_seed(0)
    squares = [
        TensorTrainLinear(inputs, outputs, generator=generator).dense().square().mean().item()
        for _ in range(400)
    ]
    assert math.isclose(sum(squares) / 400, 1 / (inputs + outputs), rel_tol=0.3)


def test_init_zero_begins_as_nothing_and_has_a_gradient():
    generator = torch.Generator().manual_seed(0)
    adapter = TensorTrainAdapter(24, 8, init="zero", generator=generator)
    x = torch.randn(5, 24)
    assert torch.equal(adapter(x), x)
    adapter(x).square().sum().backward()
    assert adapter.up.core5.grad.abs().max() > 0


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_adapter_is_its_formula(activation):
    adapter = TensorTrainAdapter(24, 8, activation=activation, dtype=torch.float64)
    for bias in (adapter.down.bias, adapter.up.bias):
        nn.init.normal_(bias)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    inner = getattr(torch, activation)(x @ adapter.down.dense().T + adapter.down.bias)
    expected = x + inner @ adapter.up.dense().T + adapter.up.bias
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)  # sums of 24 terms
    assert (expected - x).abs().max() > 1e-3


def test_sixteen_bit_inputs_are_computed_with_in_float32():
    adapter = TensorTrainAdapter(24, 8)
    x = torch.randn(5, 24).bfloat16()
    y = adapter(x)
    assert y.dtype == torch.bfloat16
    change = adapter(x.float()) - x.float()
    assert torch.equal(y, x + change.bfloat16())
    assert adapter.down(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_to_linear_computes_the_same(bias):
    train = draw(CASES[1], bias=bias, dtype=torch.float64)
    linear = train.to_linear()
    assert isinstance(linear, nn.Linear)
    assert (linear.bias is not None) == bias
    assert linear.weight.requires_grad
    x = torch.randn(4, 64, dtype=torch.float64)
    torch.testing.assert_close(linear(x), train(x), rtol=0, atol=1e-12)  # sums of 64 terms


@pytest.mark.parametrize(
    ("size", "count", "factors"),
    [
        (4096, 3, (16, 16, 16)),
        (576, 3, (8, 8, 9)),
        (768, 3, (8, 8, 12)),
        (64, 6, (2, 2, 2, 2, 2, 2)),
        (11008, 3, (16, 16, 43)),
        (7, 3, (1, 1, 7)),
        (1, 1, (1,)),
    ],
)
def test_factorise(size, count, factors):
    assert factorise(size, count) == factors
    assert math.prod(factors) == size


def test_factorise_finds_the_smallest_sum():
    for size in range(1, 200):
        pairs = [(a, size // a) for a in range(1, size + 1) if size % a == 0]
        assert sum(factorise(size, 2)) == min(map(sum, pairs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorTrainLinear(8, 8, in_dims=(2, 3)), r"in_dims: \(2, 3\).*product 8"),
        (lambda: TensorTrainLinear(8, 8, out_dims=(-2, -4)), "out_dims.*positive"),
        (lambda: TensorTrainLinear(8, 8, 0), "rank: 0.*positive number, or 5 of them"),
        (lambda: TensorTrainLinear(8, 8, (2, 2)), "expected a positive number, or 5 of them"),
        (lambda: TensorTrainLinear(8, 8, init="ones"), "init: 'ones'"),
        (lambda: TensorTrainAdapter(8, activation="gelu"), r"'gelu', expected .*relu.*tanh"),
        (lambda: TensorTrainAdapter(8, 0), "size 0"),
        (lambda: factorise(8, 0), "count 0"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
