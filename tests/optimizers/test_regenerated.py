"""perturbation='regenerated': modules compute with theta + c z, while weights are never written;
several perturbations in one batch; and what cannot be served is refused by name."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adamezo
from adamezo import FZOO, AdaMeZO, AdaZeta, HiZOO, MeZO, ZOAdaMU, batched, fused_adamezo_step
from adamezo.adapters import adapt
from adamezo.engine.perturb import regenerated
from adamezo_kernels import PhiloxState, Plan, sample_
from helpers import many_families as families
from helpers.models import MODELS, MORE_MODELS, built

SEED, ZO_EPS = 5, 1e-2
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 0, 1])
DISTRIBUTIONS = ("lowrank", "lowrank:3", "exact", "rademacher")


def make(model: nn.Module, method: type = AdaMeZO, **options):
    own = {"perturbation": "regenerated", "distribution": "lowrank", "seed": SEED, "lr": 1e-2}
    return method.for_model(model, **{**own, "zo_eps": ZO_EPS, **options})


def mlp(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), *more, nn.ReLU(), nn.Linear(16, 4))


def rows_loss(model: nn.Module):
    @batched
    def closure(batch):
        out = model(batch.repeat(X.to(next(model.parameters()).dtype)))
        return batch.mean(F.cross_entropy(out.float(), batch.repeat(Y), reduction="none"))

    return closure


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def identities(model: nn.Module) -> list[int]:
    return [id(p) for m in model.modules() for p in m._parameters.values()]


# --- what modules compute -------------------------------------------------------------------------

# One perturbation at a time; elsewhere a function without a correction gets the perturbed weight.
REFUSED = {"LSTM": "the model is a LSTM, whose weights are read inside of torch"}
ALL_MODELS = {**MODELS, **MORE_MODELS}


def in_float64(model: nn.Module, counter: int, scale: float, distribution: str) -> nn.Module:
    """A copy in float64 whose weights are where an evaluation should see them."""
    other = copy.deepcopy(model).double()
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            if p.requires_grad:
                z = torch.empty(p.shape)
                sample_(z, PhiloxState(SEED, counter), parameter=i, distribution=distribution)
                p += scale * z
    return other


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", [name for name in ALL_MODELS if name not in REFUSED])
def test_outputs_are_those_of_moved_weights(name, distribution):
    """Beside float64 the error is that of perturbation out of place, which rounds the moved weights
    and the same sums: at most four times as much, or some units of the last place."""
    model, run = built(name)
    seen: dict[str, list[torch.Tensor]] = {"regenerated": [], "out_of_place": []}
    before, places = weights_of(model), identities(model)
    for perturbation, outputs in seen.items():
        optimizer = make(model, MeZO, lr=0.0, perturbation=perturbation, distribution=distribution)

        def closure(outputs=outputs):
            outputs.append(run(model).detach().double())
            return outputs[-1].square().mean()

        for _ in range(2):
            optimizer.step(closure)
    assert all(map(torch.equal, weights_of(model), before))
    assert identities(model) == places
    if name == "mixed types":  # only its vectors are rounded, to their own types
        assert all(map(torch.equal, *seen.values()))
        return
    with torch.no_grad():
        for k, (got, other) in enumerate(zip(*seen.values(), strict=True)):
            scale = ZO_EPS * (-1) ** (k % 2)
            exact = in_float64(model, k // 2, scale, distribution)
            expected = run(exact).double() if name != "prompt tuning" else other
            error, least = (other - expected).abs().max(), 2.0**-21 * expected.abs().max()
            assert (got - expected).abs().max() <= max(4 * error, least)
            assert not torch.allclose(got, run(model).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(name):
    model, run = built(name)
    before, places = weights_of(model), identities(model)
    optimizer = make(model)
    for _ in range(2):  # and stays refused
        with pytest.raises((RuntimeError, ValueError), match=REFUSED[name]) as info:
            optimizer.step(lambda: run(model).square().mean())
        assert "out_of_place" in str(info.value)
    assert all(map(torch.equal, weights_of(model), before))
    assert identities(model) == places


@pytest.mark.parametrize("distribution", ["lowrank", "exact"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_families(name, distribution):
    """Losses of single and of batched forwards, beside those out of place. They are sums of a few
    hundred float32 numbers, and differ by 2^-22 of their value; that of a wrong perturbation
    differs by more than 2^-13, the difference of the two sides."""
    found = {}
    for kind in ("out_of_place", "regenerated", "batched"):
        model = families.build(name)
        perturbation = "out_of_place" if kind == "out_of_place" else "regenerated"
        optimizer = make(
            model, MeZO, lr=0.0, perturbation=perturbation, queries=2, distribution=distribution
        )
        closure = batched(lambda batch, model=model: families.losses(model, batch))
        one = closure if kind == "batched" else (lambda closure=closure: closure())
        found[kind] = []
        for _ in range(2):
            optimizer.step(one)
            found[kind] += optimizer.losses
    expected = found.pop("out_of_place")
    assert max(expected[:4]) - min(expected[:4]) > 2.0**-13 * max(expected)
    for kind, losses in found.items():
        for got, loss in zip(losses, expected, strict=True):
            assert abs(got - loss) < 2.0**-18 * loss, kind


@pytest.mark.parametrize("distribution", ["lowrank", "exact"])
@pytest.mark.parametrize("scheme", ["tensor-train", "tensor-train-linear", "lora", "prefix"])
def test_adapters(scheme, distribution):
    """One by one and in a batch, on Llama."""
    found = {}
    for kind in ("out_of_place", "regenerated", "batched"):
        model = families.build("LlamaForCausalLM", pad_token_id=0)
        torch.manual_seed(1)
        adapt(model, scheme)
        with torch.no_grad():
            for p in model.parameters():  # or the first perturbation would change nothing
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = MeZO(
            trained, model=model, lr=0.0, zo_eps=ZO_EPS, seed=SEED, distribution=distribution,
            perturbation="out_of_place" if kind == "out_of_place" else "regenerated",
        )  # fmt: skip
        closure = batched(lambda batch, model=model: families.losses(model, batch))
        optimizer.step(closure if kind == "batched" else lambda closure=closure: closure())
        found[kind] = optimizer.losses
    expected = found.pop("out_of_place")
    assert abs(expected[0] - expected[1]) > 2.0**-16 * expected[0]
    for losses in found.values():
        assert losses == pytest.approx(expected, rel=2.0**-19)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    """The correction is added in float32 and rounded once, where a moved weight is rounded: the
    loss is nearer to that of float64."""
    model = mlp().to(dtype)
    optimizer = make(model, MeZO, lr=0.0)
    optimizer.step(rows_loss(model))
    for got, scale in zip(optimizer.losses, (ZO_EPS, -ZO_EPS), strict=True):
        exact = in_float64(model, 0, scale, "lowrank")
        out = exact(X.to(dtype).double())
        expected = F.cross_entropy(out, Y).item()
        # Three layers, each of whose outputs is rounded to a unit of 2^-8 or 2^-11 of its size.
        assert abs(got - expected) < 3 * torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("distribution", ["lowrank", "exact"])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(where, distribution):
    model = mlp()
    optimizer = make(model, lr=0.0, distribution=distribution)
    plain = rows_loss(model)

    @batched
    def closure(batch):
        inside = torch.autocast("cpu", torch.bfloat16) if where == "inside" else nullcontext()
        with inside:
            out = model(batch.repeat(X))
        assert out.dtype == torch.bfloat16
        return batch.mean(F.cross_entropy(out.float(), batch.repeat(Y), reduction="none"))

    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        optimizer.step(closure)
    low = optimizer.losses
    optimizer = make(model, lr=0.0, distribution=distribution)
    optimizer.step(plain)
    assert low == pytest.approx(optimizer.losses, rel=2.0**-6)
    assert low != optimizer.losses


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_convolutions(distribution):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(),
        nn.Conv1d(4, 3, 2, stride=2, bias=False), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    losses = {}
    for perturbation in ("out_of_place", "regenerated"):
        optimizer = make(
            model, FZOO, queries=3, lr=0.0, distribution=distribution, perturbation=perturbation
        )
        optimizer.step(rows_loss(model))
        losses[perturbation] = optimizer.losses
    assert losses["regenerated"] == pytest.approx(losses["out_of_place"], rel=2.0**-19)


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (AdaMeZO, {"horizon": 3}),
        (MeZO, {"queries": 3}),
        (FZOO, {"queries": 4}),
        (AdaZeta, {"steps_per_epoch": 2, "exponent": 1.0}),
        (adamezo.ZOAdam, {}),
        (adamezo.MEAZO, {}),
        (adamezo.HELENE, {}),
    ],
)
def test_methods_take_the_same_steps_as_out_of_place(method, options, distribution):
    """But for the rounding of losses, which a step divides by its zo_eps."""
    ends = {}
    for kind in ("out_of_place", "regenerated", "batched"):
        model = mlp()
        perturbation = "out_of_place" if kind == "out_of_place" else "regenerated"
        optimizer = make(
            model, method, perturbation=perturbation, distribution=distribution, **options
        )
        closure = rows_loss(model)
        for _ in range(5):
            optimizer.step(closure if kind == "batched" else lambda closure=closure: closure())
        ends[kind] = torch.cat([p.detach().flatten() for p in model.parameters()])
    moved = ends["out_of_place"] - torch.cat([p.detach().flatten() for p in mlp().parameters()])
    for kind in ("regenerated", "batched"):
        # A loss near 1.4 is off by 2^-22, and p by that over 2 zo_eps: 2^-10 of a p near 0.01.
        assert (ends[kind] - ends["out_of_place"]).abs().max() < 2.0**-8 * moved.abs().max()


@pytest.mark.parametrize("distribution", ["lowrank", "exact"])
def test_a_thousand_forwards_leave_the_weights(distribution):
    """Bit for bit, in every mode; the update at lr = 0 is the only one to write."""
    for dtype in (torch.float32, torch.bfloat16):
        model = mlp().to(dtype)
        before, places = weights_of(model), identities(model)
        optimizer = make(model, MeZO, lr=0.0, distribution=distribution)
        closure = rows_loss(model)
        for i in range(334):
            optimizer.step(closure if i % 2 else lambda closure=closure: closure())
        assert all(map(torch.equal, weights_of(model), before))
        assert identities(model) == places
        assert max(p._version for p in model.parameters()) <= 334 + 2  # by initialization


def test_one_forward_a_step():
    model = mlp()
    calls = []
    model.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[0]))
    optimizer = make(model)
    for _ in range(3):
        optimizer.step(rows_loss(model))
    # The first step compares the batch with single forwards.
    assert calls == [6, 6, 12, 12, 12]
    calls.clear()
    closure = rows_loss(model)
    optimizer = make(model, FZOO, queries=5)
    optimizer.step(batched(closure._closure, chunks=2))
    assert calls == [6] * 6 + [18, 18]
    calls.clear()
    optimizer.step(batched(closure._closure, chunks=4))
    assert calls == [12, 12, 12]


def test_batches_are_compared_every_hundred_updates(monkeypatch):
    monkeypatch.setattr(regenerated, "WATCHED_EVERY", 3)
    model = mlp()
    calls = []
    model.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[0]))
    optimizer = make(model)
    for _ in range(5):
        optimizer.step(rows_loss(model))
    assert calls == [6, 6, 12, 12, 12, 6, 6, 12, 12]


def test_other_perturbations_run_a_batched_closure_one_by_one():
    ends = []
    for closure_of in (rows_loss, lambda model: lambda: rows_loss(model)()):
        for perturbation in ("inplace", "out_of_place"):
            model = mlp()
            optimizer = make(model, perturbation=perturbation)
            for _ in range(3):
                optimizer.step(closure_of(model))
            ends.append((perturbation, weights_of(model)))
    for i in (0, 1):
        assert ends[i][0] == ends[i + 2][0]
        assert all(map(torch.equal, ends[i][1], ends[i + 2][1]))


def test_dropout_is_the_same_in_all_blocks():
    """And that of single forwards, which draw the same numbers."""
    losses = []
    for kind in ("batched", "single"):
        model = mlp(nn.Dropout(0.5)).train()
        optimizer = make(model, FZOO, queries=3, lr=0.0)
        closure = rows_loss(model)
        torch.manual_seed(3)
        optimizer.step(closure if kind == "batched" else lambda closure=closure: closure())
        after = torch.rand(())
        losses.append(optimizer.losses)
    assert losses[0] == pytest.approx(losses[1], rel=2.0**-19)
    torch.manual_seed(3)
    F.dropout(torch.ones(6, 16), 0.5, True)
    assert torch.equal(after, torch.rand(()))


def test_saving_loading_and_replaying():
    model = mlp()
    optimizer = make(model, horizon=4)
    records = []
    optimizer.recorder = records.append
    closure = rows_loss(model)
    for _ in range(3):
        optimizer.step(closure)
    other = copy.deepcopy(model)
    resumed = make(other, horizon=4)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        optimizer.step(closure)
        resumed.step(rows_loss(other))
    assert all(map(torch.equal, weights_of(model), weights_of(other)))
    again = mlp()
    replayed = make(again, horizon=4)
    for record in records:
        replayed.replay(record)
    assert all(map(torch.equal, weights_of(model), weights_of(again)))
    assert all(record.perturbations == 0 for record in records)


def test_a_loss_that_is_not_finite_is_skipped():
    model = mlp()
    before = weights_of(model)
    optimizer = make(model)
    closure = rows_loss(model)
    bad = batched(lambda batch: closure._closure(batch) / 0.0 * 0.0)
    with pytest.warns(RuntimeWarning):
        optimizer.step(bad)
    assert optimizer.skipped == 1
    assert all(map(torch.equal, weights_of(model), before))
    optimizer.step(closure)
    assert not all(map(torch.equal, weights_of(model), before))


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_forward_that_raises(error):
    model = mlp()
    before, places = weights_of(model), identities(model)
    optimizer = make(model)

    def closure(batch):
        model[0](batch.repeat(X))
        raise error("in the middle")

    for one in (batched(closure), lambda: batched(closure)()):
        with pytest.raises(error, match="in the middle"):
            optimizer.step(one)
        assert all(map(torch.equal, weights_of(model), before))
        assert identities(model) == places
    optimizer.step(rows_loss(model))


def test_gradients_in_the_closure_do_not_disturb():
    model = mlp()
    closure = rows_loss(model)
    optimizer = make(model, lr=0.0)
    optimizer.step(closure)
    expected = optimizer.losses

    @batched
    def with_gradients(batch):
        with torch.enable_grad():
            x = X.clone().requires_grad_()
            out = model(batch.repeat(x))
            return batch.mean(F.cross_entropy(out, batch.repeat(Y), reduction="none"))

    again = make(model, lr=0.0)
    again.step(with_gradients)
    assert again.losses == expected
    assert all(p.grad is None for p in model.parameters())


def test_the_fused_step_and_check_closure():
    model = mlp()
    closure = rows_loss(model)
    options = dict(lr=1e-2, distribution="lowrank", perturbation="regenerated", seed=1)
    first = fused_adamezo_step(model, closure, **options)
    assert first.shape == ()
    fused_adamezo_step(model, closure, **options)
    adamezo.check_closure(make(model), closure)


def test_memory_is_that_of_the_factors():
    model = nn.Sequential(nn.Linear(1000, 500), nn.Linear(500, 4))
    optimizer = make(model)
    x = torch.randn(2, 1000)
    optimizer.step(lambda: model(x).square().mean())
    factors = 4 * (1000 + 500 + 500 + 4 + 500 + 4)
    assert optimizer.scratch_bytes == factors + 4 * (500 + 4)


# --- refusals -------------------------------------------------------------------------------------


def test_options():
    model = mlp()
    for method in (HiZOO, ZOAdaMU):
        with pytest.raises(ValueError, match="depends on its buffers: take 'out"):
            make(model, method)
    with pytest.raises(ValueError, match="perturbation='regenerated' needs the model"):
        AdaMeZO(model.parameters(), perturbation="regenerated", distribution="lowrank")
    optimizer = AdaMeZO.for_model(model, distribution="lowrank")
    optimizer.param_groups[0]["perturbation"] = "regenerated"
    optimizer.step(rows_loss(model))  # as a group may be changed between steps


def test_reads_outside_of_the_modules_are_refused():
    model = mlp()
    kept = model[0].weight.detach().t()
    for penalty in (
        lambda w=model[0].weight: w.square().sum(),
        lambda: (X @ kept).square().sum(),
    ):
        optimizer = make(model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="0.weight is read by"):
                optimizer.step(lambda penalty=penalty: apply_loss(model) + penalty())


def test_a_penalty_on_the_modules_weights():
    """Read through the module it is that of the perturbed weights."""
    losses = []
    for perturbation in ("inplace", "regenerated"):
        model = mlp()
        optimizer = make(model, MeZO, perturbation=perturbation, lr=0.0, queries=2)

        @batched
        def closure(batch, model=model):
            out = model(batch.repeat(X))
            loss = batch.mean(F.cross_entropy(out, batch.repeat(Y), reduction="none"))
            return loss + (0.1 * model[3].bias * model[3].bias).sum() if batch.count == 1 else loss

        optimizer.step(lambda closure=closure: closure())
        losses.append(optimizer.losses)
    assert losses[1] == pytest.approx(losses[0], rel=2.0**-19)


def apply_loss(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(X), Y)


def test_a_refusal_that_the_closure_catches():
    model = mlp()

    def closure():
        try:
            model[0].weight.mul_(2.0)
        except RuntimeError:
            return 1.0
        return 2.0

    with pytest.raises(RuntimeError, match="0.weight is written in a forward, by torch.*mul_"):
        make(model).step(closure)


class Clamps(nn.Linear):
    def forward(self, x):
        self.bias.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_vector_that_a_forward_writes():
    """It would be written in a copy, and lost."""
    torch.manual_seed(0)
    model = Clamps(8, 4)
    with pytest.raises(RuntimeError, match="bias is written in a forward"):
        make(model).step(lambda: apply_loss(model))


LARGE = 2**16 + 256


def test_what_a_batch_does_not_serve():
    """Functions of large matrices without a correction; of small ones it has all perturbations."""
    for width in (8, 16):
        attention = nn.MultiheadAttention(width, 2, batch_first=True)
        x = torch.randn(6, 5, width)

        @batched
        def closure(batch, attention=attention, x=x):
            y = batch.repeat(x)
            return batch.mean(attention(y, y, y)[0].square().mean((1, 2)))

        refusal = "in_proj_.* is read by .*attention_forward.* of 2 perturbations: pass a closure"
        with pytest.raises(RuntimeError, match=refusal):
            make(attention).step(closure)
        make(attention).step(lambda closure=closure: closure())
    for rows, served in ((16, True), (LARGE // 16, False)):
        model = Rolled(rows)
        losses = []
        for perturbation in ("out_of_place", "regenerated"):
            optimizer = make(model, FZOO, queries=2, perturbation=perturbation, lr=0.0)
            closure = rows_loss(model)
            optimizer.step(lambda closure=closure: closure())
            losses.append(optimizer.losses)
        assert losses[1] == pytest.approx(losses[0], rel=2.0**-19)
        if served:
            optimizer.step(rows_loss(model))
        else:
            with pytest.raises(RuntimeError, match="weight is read by torch.Tensor.reshape"):
                optimizer.step(rows_loss(model))


class Rolled(nn.Module):
    """Its weight is reshaped before it is used, as the cores of a tensor train are."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(rows // 4, 4, 16) / 4)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.weight.reshape(-1, 16)[:8, :4] @ torch.eye(4)
        return x @ wide + self.bias


def test_rows_that_mix_are_refused():
    """A normalization over the batch, a sequence before the batch, and a batch norm in training."""
    model = mlp()

    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    mixing = mlp(Centred())
    with pytest.raises(RuntimeError, match="other losses than alone.*mixes rows of a batch"):
        make(mixing).step(rows_loss(mixing))
    make(mixing).step(lambda: apply_loss(mixing))

    @batched
    def sequence_first(batch):
        x = batch.repeat(X.view(2, 3, 8)).transpose(0, 1)  # of shape (3, 2 n, 8): rows are second
        out = model(x).transpose(0, 1)
        return batch.mean(F.cross_entropy(out.flatten(0, 1), batch.repeat(Y.view(2, 3)).flatten(),
                                          reduction="none"))  # fmt: skip

    with pytest.raises(RuntimeError, match="other losses than alone"):
        make(model, FZOO, queries=2).step(sequence_first)
    normed = mlp(nn.BatchNorm1d(16)).train()
    with pytest.raises(ValueError, match="2 is a BatchNorm1d in training mode.*not batched"):
        make(normed).step(rows_loss(normed))
    make(normed.eval()).step(rows_loss(normed))


def test_what_a_batched_closure_returns():
    model = mlp()
    for result, got in (
        (lambda batch: apply_loss(model), r"shape \(\)"),
        (lambda batch: 1.0, "float"),
        (lambda batch: torch.ones(3), r"shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=f"one loss for each perturbation.*got {got}"):
            make(model).step(batched(result))
    with pytest.raises(TypeError, match="expected a function of a batch, got float"):
        batched(1.0)
    for chunks in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="chunks must be an integer of at least 1"):
            batched(lambda batch: None, chunks=chunks)
    batch = adamezo.PerturbedBatch(2)
    with pytest.raises(ValueError, match=r"for 2 blocks of rows, got shape \(3,\)"):
        batch.mean(torch.ones(3))
    with pytest.raises(ValueError, match="expected weights for the 2 losses of the inputs, got 3"):
        batch.mean(torch.ones(4), torch.ones(3))


def test_the_helpers_of_a_batch():
    batch = adamezo.PerturbedBatch(3)
    x = torch.arange(4).view(2, 2)
    found = batch.repeat({"x": x, "scalar": torch.tensor(1.0), "flag": True, "list": [x]})
    assert torch.equal(found["x"], torch.cat([x, x, x]))
    assert torch.equal(found["list"][0], found["x"])
    assert found["flag"] is True
    assert found["scalar"] == 1.0
    assert torch.equal(batch.split(found["x"])[1], x)
    losses = torch.arange(12.0).view(6, 2)
    mask = torch.tensor([[1, 0], [1, 1]])
    expected = [(losses[2 * k : 2 * k + 2] * mask).sum().item() / 3 for k in range(3)]
    assert batch.mean(losses, mask).tolist() == pytest.approx(expected)
    assert math.isclose(batch.mean(losses)[0].item(), 1.5)


def test_modules_and_weights_are_replaced():
    """Between steps: what reads and what is trained is looked up again."""
    model = mlp()
    optimizer = make(model)
    optimizer.step(rows_loss(model))
    model[2] = nn.Tanh()
    model[0].weight.data = model[0].weight.data.clone()
    optimizer.step(rows_loss(model))
    z = [
        sample_(torch.empty(p.shape), PhiloxState(SEED, 1), parameter=i, distribution="lowrank")
        for i, p in enumerate(model.parameters())
    ]
    frozen = make(model, lr=0.0)
    for group in frozen.param_groups:
        group["next_direction"] = 1
    frozen.step(rows_loss(model))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, along in zip(moved.parameters(), z, strict=True):
            p += ZO_EPS * along
    assert frozen.losses[0] == pytest.approx(apply_loss(moved).item(), rel=2.0**-20)


def test_a_plan_of_pieces_has_no_factors():
    from adamezo_kernels.factors import Factors

    with pytest.raises(ValueError, match="expected a lowrank or flipout distribution, got 'exact'"):
        Factors([Plan([torch.zeros(2, 3)])], "exact")
    factors = Factors([Plan([torch.zeros(2, 3)])], "lowrank")
    with pytest.raises(ValueError, match="without offset and of no rule, got offset 3"):
        factors.fill(PhiloxState(1, 2, 3))
