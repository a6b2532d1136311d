"""GRZO, and directions that share their normals in forwards of a batch: what is evaluated and what
an update is, by formulas that know nothing of how they are computed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adamezo import FZOO, GRZO, MeZO, PerturbedBatch, batched
from adamezo.engine.perturb.served import full
from adamezo_kernels import PhiloxState, Plan, sample_
from adamezo_kernels.factors import Factors
from helpers import many_families as families

SEED, SIGMA = 5, 1e-2
X = torch.randint(0, 9, (6, 2), generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 0, 1])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 8), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten(),
        nn.Linear(16, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4, bias=False),
    )  # fmt: skip


def rows_loss(model: nn.Module):
    @batched
    def closure(batch):
        out = model(batch.repeat(X))
        return batch.mean(F.cross_entropy(out, batch.repeat(Y), reduction="none"))

    return closure


def make(model: nn.Module, method: type = GRZO, **options):
    own = {"lr": 1e-3, "zo_eps": SIGMA, "seed": SEED, "perturbation": "regenerated"}
    return method.for_model(model, **{**own, **options})


def moved(model: nn.Module, counter: int, scale: float, distribution: str) -> nn.Module:
    other = copy.deepcopy(model).double()
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            z = torch.empty(p.shape)
            sample_(z, PhiloxState(SEED, counter), parameter=i, distribution=distribution)
            p += scale * z
    return other


@pytest.mark.parametrize("kind", ["inplace", "out_of_place", "regenerated", "batched"])
@pytest.mark.parametrize("examples", [2, 6])
def test_each_part_has_its_own_direction(examples, kind):
    """Losses beside float64: they are sums of tens of float32 numbers near 1, and differ by 2^-21;
    those of two parts by more than 2^-10."""
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    perturbation = "regenerated" if kind == "batched" else kind
    optimizer = make(model, lr=0.0, examples=examples, perturbation=perturbation)
    assert optimizer.defaults["distribution"] == f"flipout:{examples}"
    closure = rows_loss(model)
    for step in range(2):
        if kind == "batched":
            optimizer.step(closure)
        else:  # one block at a time, each still of its part
            closure.chunks = 2 * examples
            optimizer.step(closure)
        losses, size = iter(optimizer.losses), 6 // examples
        seen = []
        for scale in (SIGMA, -SIGMA):
            for i in range(examples):
                other = moved(model, step * examples + i, scale, f"flipout:{examples}")
                part = slice(i * size, (i + 1) * size)
                with torch.no_grad():
                    seen.append(F.cross_entropy(other(X[part]), Y[part]).item())
                assert next(losses) == pytest.approx(seen[-1], rel=2.0**-19)
        assert max(seen) - min(seen) > 2.0**-10
    if kind != "inplace":
        assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_update_is_normals_times_a_product_of_signs(chunks):
    """W -= lr U * (R^T diag(a) S) / (2 sigma B), with U, R and S from their own streams."""
    model = net()
    before = [p.detach().double() for p in model.parameters()]
    optimizer = make(model, examples=6)
    closure = rows_loss(model)
    closure.chunks = chunks
    optimizer.step(closure)
    sides = torch.tensor(optimizer.losses, dtype=torch.float64)
    delta = (sides[:6] - sides[6:]) / 2
    a = delta / (delta.std() + 1e-8)
    assert optimizer.measured == pytest.approx((a / (2 * SIGMA)).tolist(), rel=1e-12)
    signs = [Factors([Plan([*model.parameters()])], "flipout:6") for _ in range(6)]
    for i, factors in enumerate(signs):
        factors.fill(PhiloxState(SEED, i))
    for k, (p, start) in enumerate(zip(model.parameters(), before, strict=True)):
        if p.dim() < 2:
            along = sum(a[i] * signs[i].of[k].u.double() for i in range(6))
        else:
            u = sample_(torch.empty(p.shape), PhiloxState(SEED, 0), parameter=k).double()
            r = torch.cat([factors.of[k].u for factors in signs]).double()
            s = torch.cat([factors.of[k].v for factors in signs]).double()
            along = u * (r.t() @ torch.diag(a) @ s).view(p.shape)
        step = 1e-3 * along / (2 * SIGMA * 6)
        # Six products are added in float32, and the result to a weight.
        bound = 2.0**-24 * (start.abs() + 8 * 1e-3 * 6.56 * a.abs().sum() / (2 * SIGMA * 6))
        assert ((p.detach().double() - (start - step)).abs() <= bound).all()
        assert step.abs().max() > 1e-3


def test_one_forward_a_step():
    model, rows = net(), []
    model.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[0]))
    optimizer = make(model, examples=3)
    for _ in range(2):
        optimizer.step(rows_loss(model))
    assert rows == [2] * 6 + [12, 12]  # the first step compares with each part alone


def test_replay_and_a_state():
    model = net()
    optimizer = make(model, examples=3, weight_decay=0.1)
    records = []
    optimizer.recorder = records.append
    for _ in range(2):
        optimizer.step(rows_loss(model))
    other = copy.deepcopy(model)
    resumed = make(other, examples=3, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for each, of in ((optimizer, model), (resumed, other)):
        each.step(rows_loss(of))
    again = net()
    replayed = make(again, examples=3, weight_decay=0.1)
    for record in records:
        replayed.replay(record)
    for p, q, r in zip(*(m.parameters() for m in (model, other, again)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_what_grzo_refuses():
    model = net()
    optimizer = make(model, examples=4)
    with pytest.raises(ValueError, match="a batch of 6 rows in 4 parts of equal length.*drop_last"):
        optimizer.step(rows_loss(model))
    for examples in (1, 0, -3):
        with pytest.raises(ValueError, match="Invalid examples: .* at least 2"):
            make(model, examples=examples)
    with pytest.raises(ValueError, match="Invalid eps value: -1.0"):
        make(model, eps=-1.0)


def test_no_spread_is_no_step():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model, examples=3, perturbation="out_of_place", rounding="nearest")
    optimizer.step(lambda: torch.tensor(1.5))
    assert optimizer.measured == (0.0, 0.0, 0.0)
    assert all(map(torch.equal, model.parameters(), before))


def test_the_parts_of_a_batch():
    x, mask = torch.arange(4).view(4, 1), torch.tensor([[1.0, 0.0], [1.0, 1.0]] * 2)
    batch = PerturbedBatch(3, parts=2, which=[1, 0, 1])
    assert batch.repeat(x).flatten().tolist() == [2, 3, 0, 1, 2, 3]
    losses = torch.arange(12.0).view(6, 2)
    expected = [(0 + 2 + 3) / 3, (4 + 6 + 7) / 3, (8 + 10 + 11) / 3]
    assert batch.mean(losses, mask).tolist() == pytest.approx(expected)
    both = PerturbedBatch(4, parts=2, which=[0, 1, 0, 1])
    assert both.repeat(x).flatten().tolist() == [0, 1, 2, 3] * 2
    with pytest.raises(ValueError, match="weights for the 8 losses of the inputs, got 4"):
        both.mean(torch.ones(8, 2).view(8, 2), torch.ones(4))


# --- shared normals in a batch --------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 50, 2**17])
@pytest.mark.parametrize("turned", [False, True])
def test_fzoo_with_shared_normals(piece, turned, monkeypatch):
    """Of one U for all, which is made once for each piece of a matrix; and of two, where the
    number of directions is none of the distribution."""
    monkeypatch.setattr(full, "PIECE", piece)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 12) / 3)
            self.bias = nn.Parameter(torch.zeros(12))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight) if turned else x @ self.weight

    torch.manual_seed(0)
    model = nn.Sequential(Turned(), nn.Tanh(), nn.Linear(12, 4))
    x = torch.randn(6, 8)

    @batched
    def closure(batch):
        out = model(batch.repeat(x))
        return batch.mean(F.cross_entropy(out, batch.repeat(Y), reduction="none"))

    for distribution in ("flipout:4", "flipout:3"):
        found = {}
        for kind in ("out_of_place", "regenerated", "batched"):
            perturbation = "out_of_place" if kind == "out_of_place" else "regenerated"
            optimizer = make(model, FZOO, lr=0.0, queries=4, perturbation=perturbation,
                             distribution=distribution)  # fmt: skip
            made = []
            sampled = full.Full.sampled

            def counted(self, *args, made=made, sampled=sampled):
                made.append(args)
                return sampled(self, *args)

            monkeypatch.setattr(full.Full, "sampled", counted)
            optimizer.step(closure if kind == "batched" else lambda: closure())
            optimizer.step(closure if kind == "batched" else lambda: closure())
            monkeypatch.setattr(full.Full, "sampled", sampled)
            found[kind] = optimizer.losses
            if kind == "batched" and piece == 2**17 and distribution == "flipout:4":
                # Two weights: five forwards of one perturbation that compare, and two batches.
                assert len(made) == 2 * (5 + 1 + 1)
        expected = found.pop("out_of_place")
        assert max(expected) - min(expected) > 2.0**-10
        for losses in found.values():
            assert losses == pytest.approx(expected, rel=2.0**-19)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BartForConditionalGeneration"]
)
def test_families(name):
    """As in test_regenerated.py: within 2^-18 of the losses out of place."""
    found = {}
    for kind in ("out_of_place", "regenerated", "batched"):
        model = families.build(name)
        perturbation = "out_of_place" if kind == "out_of_place" else "regenerated"
        optimizer = make(model, MeZO, lr=0.0, queries=2, distribution="flipout:2",
                         perturbation=perturbation)  # fmt: skip
        closure = batched(lambda batch, model=model: families.losses(model, batch))
        optimizer.step(closure if kind == "batched" else lambda closure=closure: closure())
        found[kind] = optimizer.losses
    expected = found.pop("out_of_place")
    assert max(expected) - min(expected) > 2.0**-13 * max(expected)
    for losses in found.values():
        assert losses == pytest.approx(expected, rel=2.0**-18)


def test_models_of_transformers_have_a_loss_for_each_example():
    losses = pytest.importorskip("adamezo.integrations.transformers").losses
    model = families.build("LlamaForCausalLM")
    labels = families.IDS.clone()
    labels[0, :4] = -100
    inputs = {"input_ids": families.IDS, "labels": labels}
    optimizer = make(model, lr=0.0, examples=3)
    optimizer.step(batched(lambda batch: losses(model, inputs, batch)))
    got = optimizer.losses
    for k, scale in ((0, SIGMA), (2, SIGMA), (1, -SIGMA)):
        with torch.no_grad():
            other = moved(model, k, scale, "flipout:3").float()
            alone = other(input_ids=families.IDS[k : k + 1], labels=labels[k : k + 1]).loss.item()
        assert got[k + 3 * (scale < 0)] == pytest.approx(alone, rel=2.0**-18)
