"""perturbation='regenerated' with full directions: weights are displaced a piece at a time, whose
bits are those of the whole, and nothing of a weight's size is made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamezo import FZOO, MeZO, batched
from adamezo.engine.perturb.served import full
from adamezo_kernels import PhiloxState, Plan, sample_
from adamezo_kernels.pieces import Pieces
from helpers import many_families as families

SEED, ZO_EPS = 5, 1e-2
DISTRIBUTIONS = ("exact", "rademacher")
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 0, 1])


def losses_of(model: nn.Module, loss, kind: str, method: type = FZOO, **options) -> list[float]:
    """Of two steps that do not move, out of place, regenerated one by one, and in a batch."""
    perturbation = "out_of_place" if kind == "out_of_place" else "regenerated"
    own = {"distribution": "exact", "lr": 0.0, "zo_eps": ZO_EPS, "seed": SEED}
    optimizer = method.for_model(model, perturbation=perturbation, **{**own, **options})
    closure = batched(lambda batch: loss(model, batch))
    found: list[float] = []
    for _ in range(2):
        optimizer.step(closure if kind == "batched" else lambda: closure())
        found += optimizer.losses
    return found


# --- pieces of directions -------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, "lowrank:2"])
@pytest.mark.parametrize("shape", [(7, 300), (300, 7), (5, 3, 2, 3)])
def test_pieces_have_the_bits_of_the_whole(shape, distribution):
    state, n = PhiloxState(SEED, 9), torch.Size(shape[1:]).numel()
    (segment,) = Plan([torch.zeros(shape)], parameters=[3])
    whole = sample_(torch.empty(shape), state, parameter=3, distribution=distribution).view(-1, n)
    pieces = Pieces(segment, distribution)
    for start, stop in ((0, shape[0]), (1, 4), (4, 5)):
        out = torch.full((stop - start, n), torch.nan)
        pieces.some_rows(state, start, out)
        assert torch.equal(out, whole[start:stop])
    for start, stop in ((0, n), (1, 4), (2, 3)):
        out = torch.full((shape[0], stop - start), torch.nan)
        for _ in range(2):  # the second one from what is kept of the first
            pieces.some_columns(state, start, out, again=True)
            assert torch.equal(out, whole[:, start:stop])
    out = torch.full((3, n), torch.nan)
    pieces.these_rows(state, [4, 0, 2], out)
    assert torch.equal(out, whole[[4, 0, 2]])
    out = torch.full((2, shape[0]), torch.nan)
    pieces.these_columns(state, [n - 1, 0], out)
    assert torch.equal(out, whole[:, [n - 1, 0]].t())
    for fill, place in (
        (pieces.some_rows, 0), (pieces.some_columns, 0), (pieces.these_rows, [0, 1]),
        (pieces.these_columns, [0, 1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected a contiguous tensor of shape .* got shape"):
            fill(state, place, torch.empty(2, n + shape[0]))


# --- forwards in pieces ---------------------------------------------------------------------------


@pytest.fixture(params=[1, 40, 2**17])
def piece(request, monkeypatch):
    """Pieces of one row, of a few, and of whole weights."""
    monkeypatch.setattr(full, "PIECE", request.param)
    return request.param


def rows_loss(model: nn.Module, batch):
    out = model(batch.repeat(X.to(next(model.parameters()).dtype)))
    return batch.mean(F.cross_entropy(out.float(), batch.repeat(Y), reduction="none"))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))


class Products(nn.Module):
    """Every function of matrices that is served: rows of a table, a convolution, and products with
    a matrix, its transpose, and a bias on either side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 8)
        self.places = nn.Embedding(9, 8)
        self.convolution = nn.Conv1d(2, 4, 3, padding=1)
        self.inner = nn.Parameter(torch.randn(16, 12) / 4)
        self.turned = nn.Parameter(torch.randn(12, 9) / 3)
        self.shift = nn.Parameter(torch.randn(9) / 3)
        self.head = nn.Linear(9, 4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = x.abs().mul(3).long().clamp(max=6)
        y = x + self.table(ids).mean(1) + self.places(torch.arange(8))[3]
        y = self.convolution(y.unflatten(1, (2, 4))).flatten(1)
        y = torch.tanh(y @ self.inner)
        y = torch.addmm(self.shift, y, self.turned) + (y @ self.turned.t().t())
        return self.frozen(self.head(torch.relu(y)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", ["regenerated", "batched"])
@pytest.mark.parametrize("model", [mlp, Products])
def test_losses_in_pieces(model, kind, distribution, piece):
    """float32 sums of tens of numbers in another order, after each of which a relative error of
    some 2^-23 remains: those of the loss were 2^-22 at most. The sides differ by far more."""
    model = model()
    before = [p.detach().clone() for p in model.parameters()]
    options = {"queries": 3, "distribution": distribution}
    expected = losses_of(model, rows_loss, "out_of_place", **options)
    got = losses_of(model, rows_loss, kind, **options)
    assert max(expected) - min(expected) > 2.0**-12 * max(expected)
    for a, b in zip(got, expected, strict=True):
        assert abs(a - b) < 2.0**-19 * b
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("kind", ["regenerated", "batched"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_tied_head_in_pieces(name, kind, piece):
    """Its rows are read as an embedding, and all of it as a product, along one direction."""
    model = families.build(name, tie_word_embeddings=True)
    expected = losses_of(model, families.losses, "out_of_place", MeZO)
    got = losses_of(model, families.losses, kind, MeZO)
    assert got == pytest.approx(expected, rel=2.0**-18)


@pytest.mark.parametrize("kind", ["regenerated", "batched"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype, kind):
    """Displaced weights are rounded as those out of place, so that only sums differ: outputs near
    1 of three layers, each rounded once to a unit of 2^-8 or 2^-11."""
    model = mlp().to(dtype)
    expected = losses_of(model, rows_loss, "out_of_place", queries=3)
    got = losses_of(model, rows_loss, kind, queries=3)
    assert got == pytest.approx(expected, rel=3 * torch.finfo(dtype).eps)
    assert len(set(expected)) == len(expected) - 1  # theta itself is in both steps


class Largest(TorchDispatchMode):
    """The largest tensor that any operation has made, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for t in tree_leaves(result):
            if _is_tensor(t) and t.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return result


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("kind", ["out_of_place", "regenerated", "batched"])
@pytest.mark.parametrize("turned", [False, True])
def test_nothing_of_a_weights_size_is_made(kind, turned, monkeypatch):
    monkeypatch.setattr(full, "PIECE", 2**12)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(200, 200)
            self.weight = nn.Parameter(torch.randn(200, 200) / 14)

        def forward(self, ids):
            y = self.table(ids).mean(1)
            return y @ self.weight if turned else F.linear(y, self.weight)

    torch.manual_seed(0)
    model = Wide()
    ids = torch.randint(0, 200, (2, 3))
    largest = Largest()

    def loss(model, batch):
        with largest:
            return batch.mean(model(batch.repeat(ids)).square())

    optimizer = MeZO.for_model(
        model, lr=0.0, distribution="exact",
        perturbation="out_of_place" if kind == "out_of_place" else "regenerated",
    )  # fmt: skip
    closure = batched(lambda batch: loss(model, batch))
    optimizer.step(closure if kind == "batched" else lambda: closure())
    if kind == "out_of_place":
        assert optimizer.scratch_bytes >= 4 * 200 * 200
    else:
        assert 0 < largest.elements <= 2**12
        assert optimizer.scratch_bytes == 2 * 4 * 2**12


def test_nothing_is_kept_of_a_whole_weight():
    """A function that is not served gets the perturbed weight, which exists while it runs."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 30))

        def forward(self):
            return torch.linalg.norm(self.weight) + torch.cumsum(self.weight, 0).mean()

    model = Norm()
    optimizer = MeZO.for_model(model, lr=0.0, distribution="exact", perturbation="regenerated")
    for _ in range(3):
        optimizer.step(lambda: model())
    pieces = optimizer._corrected.kind._pieces[0]
    assert pieces._calls == {}
    assert optimizer.scratch_bytes == 0


def test_gradients_of_inputs_are_not_silently_wrong():
    """A closure may have them on; through displaced pieces, which are gone, none are given."""
    model = mlp()
    x = X.clone().requires_grad_()
    kept = []

    def closure():
        with torch.enable_grad():
            loss = F.cross_entropy(model(x), Y)
            kept.append(loss)
            return loss.detach()

    optimizer = MeZO.for_model(
        model, lr=0.0, distribution="exact", perturbation="regenerated", seed=SEED
    )
    optimizer.step(closure)
    with pytest.raises(RuntimeError):
        kept[0].backward()
