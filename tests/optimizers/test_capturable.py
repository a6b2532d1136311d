"""Steps whose numbers stay on the device: the bits of ordinary ones, and nothing read back."""

from __future__ import annotations

import copy
import gc
import json
import math

import pytest
import torch
from torch import nn

from adamezo import (
    FZOO,
    GRZO,
    HELENE,
    MEAZO,
    AdaMeZO,
    AdaZeta,
    HiZOO,
    MeZO,
    ScalarAdaMeZO,
    ZOAdam,
)
from adamezo.engine.arithmetic import (
    alike,
    quotient,
    square_root,
    steps_to_one,
    total,
    usable,
    where,
)
from helpers.backends import needs_native
from helpers.reads import ReadBacks

SEED = 0x13198A2E03707344


def gpu(test):
    """For `make gpu-check`."""
    no_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(no_device(test))


OPTIONS = {"lr": 0.01, "zo_eps": 1e-2, "seed": SEED}
H = {"horizon": 4}
CASES = {
    "paper": (AdaMeZO, H),
    "bias corrected": (AdaMeZO, {"normalization": "bias_corrected", "weight_decay": 0.1, **H}),
    "official": (AdaMeZO, {"normalization": "official", "lr": 1e-4, **H}),
    "momentum, ascending": (AdaMeZO, {"betas": (0.8, 0.0), "maximize": True, **H}),
    "no betas": (AdaMeZO, {"betas": (0.0, 0.0), "horizon": 1}),
    "no first beta": (AdaMeZO, {"betas": (0.0, 0.9), **H}),
    "signs": (AdaMeZO, {"distribution": "rademacher", **H}),
    "control": (ScalarAdaMeZO, H),
    "control, bias corrected": (ScalarAdaMeZO, {"normalization": "bias_corrected", **H}),
    "control, momentum": (ScalarAdaMeZO, {"betas": (0.8, 0.0), **H}),
    "MeZO": (MeZO, {}),
    "MeZO, 3 directions": (MeZO, {"queries": 3, "weight_decay": 0.1, "maximize": True}),
    "MeZO, exact": (MeZO, {"queries": 2, "perturbation": "out_of_place"}),
    "MEAZO": (MEAZO, {"weight_decay": 0.1}),
    "MEAZO, soon corrected": (MEAZO, {"beta": 1e-3, "maximize": True}),  # within 9 steps
    "MEAZO, no memory": (MEAZO, {"beta": 0.0}),
    "FZOO": (FZOO, {"queries": 5, "lr": 1e-3}),
    "GRZO": (GRZO, {"examples": 4, "lr": 1e-3}),
    "FZOO, normals, exact": (
        FZOO,
        {"queries": 2, "lr": 1e-3, "distribution": "exact", "perturbation": "out_of_place"},
    ),
    "ZOAdam": (ZOAdam, {"weight_decay": 0.1, "maximize": True}),
    "ZOAdam, bfloat16 moments": (ZOAdam, {"betas": (0.5, 0.5), "buffer_dtype": "bfloat16"}),
    "HiZOO": (HiZOO, {"alpha": 0.01, "lr": 1e-3}),
    "HiZOO, exact": (HiZOO, {"alpha": 0.01, "lr": 1e-3, "perturbation": "out_of_place"}),
    "HELENE": (HELENE, {"curvature_every": 3, "clip": 0.1, "anneal": 5.0, "lr": 1e-3}),
}
all_cases = pytest.mark.parametrize("case", CASES)
all_methods = pytest.mark.parametrize(
    "case", ["paper", "control", "MeZO", "MEAZO", "FZOO", "HiZOO", "HELENE"]
)


def make_model(device: str = "cpu") -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 3))
    model[2].bfloat16()
    return model.to(device)


def closure_of(model: nn.Module, scale: torch.Tensor | None = None):
    """A loss on a fixed batch, times `scale`, which stands for a batch that overflows."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(32, 7, generator=generator).to(device)
    y = torch.randint(0, 3, (32,), generator=generator).to(device)

    def closure() -> torch.Tensor:
        hidden = model[1](model[0](x)).bfloat16()
        loss = nn.functional.cross_entropy(model[2](hidden).float(), y)
        return loss if scale is None else loss * scale

    return closure


def make(model: nn.Module, capturable: bool, case: str = "paper", **options):
    groups = [
        {"params": list(model[0].parameters()), "lr": 2 * CASES[case][1].get("lr", 0.01)},
        {"params": list(model[2].parameters())},
    ]
    method, own = CASES[case]
    options = {**OPTIONS, **own, **options}
    return method(groups, **options, capturable=capturable, model=model)


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().cpu().contiguous().view(torch.uint8).clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def history(optimizer) -> list[dict]:
    names = (*optimizer.history, "steps", "next_direction", "skipped_in_a_row")
    return [{n: g[n] for n in names} for g in optimizer.state_dict()["param_groups"]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@all_cases
def test_a_capturable_run_has_the_bits_of_an_ordinary_one(case, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ends = []
    for capturable in (False, True):
        model = make_model(device)
        optimizer = make(model, capturable, case)
        results = []
        for _ in range(9):
            mean = optimizer.step(closure_of(model))
            results.append((mean.item(), [*map(float, optimizer.measured)]))
        ends.append((bits(model), results, history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert not same(ends[0][0], bits(make_model()))


@all_methods
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_non_finite_loss_is_skipped_on_the_device(case, value):
    ends = []
    for capturable in (False, True):
        model, scale = make_model(), torch.ones(())
        optimizer = make(model, capturable, case)
        closure = closure_of(model, scale)
        kept = []
        for t in range(9):
            scale.fill_(value if t in (0, 3, 4, 8) else 1.0)
            if capturable or t:
                optimizer.step(closure)
            else:
                with pytest.warns(RuntimeWarning, match="skipped"):
                    optimizer.step(closure)
            kept.append(history(optimizer))
        ends.append((bits(model), int(optimizer.skipped), kept))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert ends[1][1] == 4
    assert [group["skipped_in_a_row"] for group in ends[1][2][4]] == [2, 2]


@needs_native
@all_cases
def test_nothing_is_read_back(case):
    model = make_model()
    optimizer = make(model, True, case)
    closure = closure_of(model)
    optimizer.step(closure)  # puts the numbers on the device
    with ReadBacks() as reads:
        for _ in range(3):
            optimizer.step(closure)
    assert reads.seen == []
    with ReadBacks() as reads:  # the detector detects
        optimizer.measured[0].item()
        optimizer.measured[0] / 3
        bool(optimizer.losses[0] < optimizer.losses[1])
    assert len(reads.seen) == 3


@all_methods
def test_a_state_has_plain_numbers(case):
    model = make_model()
    optimizer = make(model, True, case)
    for _ in range(3):
        optimizer.step(closure_of(model))
    for group in optimizer.state_dict()["param_groups"]:
        del group["lr"]  # a tensor, as torch's own optimizers have it with capturable
        assert json.loads(json.dumps(group)) == {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in group.items()
        }


@needs_native
@all_methods
def test_an_ordinary_step_reads_once(case, monkeypatch):
    model = make_model()
    optimizer = make(model, False, case)
    closure = closure_of(model)
    # Losses on the CPU are read one by one, which is faster there: take these for a GPU's.
    monkeypatch.setattr("adamezo.engine.closure._costs_a_wait", lambda tensor: True)
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, real=real, name=name):
            reads.append(name)
            return real(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    optimizer.step(closure)
    assert reads == ["tolist"]


@pytest.mark.parametrize(
    "losses",
    [
        [0.3, 0.7, 0.7, 0.7],  # thirds do not sum exactly: sigma by its formula is no 0
        [0.7, 0.7, 0.7, 0.7],
        [1e-200, 0.0, 1e-200, 0.0],
        [0.5, 0.7, 0.8, 0.7],
        [math.nan, 0.7, 0.7, 0.7],
        [0.7, 0.7, math.nan, 0.7],
        [1e200, -1e200, 1e200, 0.0],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the losses of a step")
def test_fzoo_guards_its_scale_without_a_look(losses):
    ends = []
    for capturable in (False, True):
        model = make_model()
        optimizer = make(model, capturable, "FZOO", queries=3, weight_decay=0.5)
        values = iter(losses)
        optimizer.step(lambda values=values: torch.tensor(next(values), dtype=torch.float64))
        measured = [repr(float(value)) for value in optimizer.measured]
        ends.append((bits(model), measured, int(optimizer.skipped), history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    usable = all(abs(value) < 1e19 for value in losses)
    assert ends[1][2] == (not usable)
    flat = losses[1] == losses[2] == losses[3] or max(losses) == 1e-200
    if usable:
        assert (ends[1][1] == ["0.0"] * 3) == flat


@all_methods
def test_the_learning_rate_is_read_at_each_step(case):
    ends = []
    for capturable in (False, True):
        model = make_model()
        optimizer = make(model, capturable, case)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        for _ in range(5):
            optimizer.step(closure_of(model))
            scheduler.step()
        ends.append(bits(model))
        if capturable:
            assert all(isinstance(g["lr"], torch.Tensor) for g in optimizer.param_groups)
    assert same(*ends)


@pytest.mark.parametrize("lr", [0.3, torch.tensor([0.3])], ids=str)
def test_a_learning_rate_that_is_set_by_hand(lr):
    ends = []
    for capturable in (False, True):
        model = make_model()
        optimizer = make(model, capturable, "MeZO")
        optimizer.step(closure_of(model))
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(2):
            optimizer.step(closure_of(model))
        ends.append((bits(model), history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@all_methods
def test_a_state_goes_from_capturable_to_ordinary_and_back(case):
    straight = make_model()
    optimizer = make(straight, False, case)
    for _ in range(9):
        optimizer.step(closure_of(straight))
    model, state = make_model(), None
    for capturable in (True, False, True):
        optimizer = make(model, capturable, case)
        if state is not None:
            for group in state["param_groups"]:
                group["capturable"] = capturable
                group["lr"] = float(group["lr"])
            optimizer.load_state_dict(state)
        for _ in range(3):
            optimizer.step(closure_of(model))
        state = copy.deepcopy(optimizer.state_dict())
    assert same(bits(straight), bits(model))


def test_an_option_that_changes_takes_effect():
    ends = []
    for capturable in (False, True):
        model = make_model()
        optimizer = make(model, capturable)
        for t in range(6):
            if t == 3:
                optimizer.param_groups[0]["betas"] = (0.5, 0.8)
                optimizer.param_groups[1]["weight_decay"] = 0.5
                optimizer.param_groups[1]["horizon"] = 2
            optimizer.step(closure_of(model))
        ends.append((bits(model), history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize(
    ("case", "options"),
    [("MeZO", {"queries": 3}), ("FZOO", {"queries": 3}), ("MEAZO", {"beta": 0.5})],
    ids=str,
)
def test_an_option_of_the_method_that_changes_takes_effect(case, options):
    """Also one that changes the number of directions."""
    ends = []
    for capturable in (False, True):
        model = make_model()
        optimizer = make(model, capturable, case)
        for t in range(6):
            if t == 3:
                for group in optimizer.param_groups:
                    group.update(options)
            optimizer.step(closure_of(model))
        ends.append((bits(model), history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("beta", [0.0, 1e-300, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 2.0**-14])
def test_the_table_of_a_correction_ends_where_it_is_one(beta):
    steps = steps_to_one(beta)
    assert all(1 - beta**t == 1 for t in range(steps, steps + 100))
    assert steps <= 3 or 1 - beta ** (steps * 0.97 - 3) < 1  # and is not much longer than that


@all_methods
def test_capturable_may_be_set_and_unset_in_the_groups(case):
    ends = []
    for changing in (False, True):
        model = make_model()
        optimizer = make(model, False, case)
        for t in range(8):
            if changing and t in (2, 4, 6):
                for group in optimizer.param_groups:
                    group["capturable"] = not group["capturable"]
            optimizer.step(closure_of(model))
        ends.append((bits(model), history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_records_and_capturable_steps_may_take_turns():
    model, replica = make_model(), make_model()
    optimizer, twin = make(model, False), make(replica, True)
    records = []
    optimizer.recorder = records.append
    for t in range(6):
        optimizer.step(closure_of(model))
        if t % 2:
            twin.replay(records[-1])
        else:
            twin.step(closure_of(replica))
    assert same(bits(model), bits(replica))
    assert history(optimizer) == history(twin)


def test_arithmetic_of_floats_and_of_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = [*torch.randn(60, dtype=torch.float64, generator=generator).exp()]
    floats = [tensor.item() for tensor in tensors]
    for a, b in ((tensors, floats), (floats[:1] * 3, [floats[0]] * 3)):
        assert float(total(a)) == total(b)
        assert [float(quotient(x, 0.3)) for x in a] == [quotient(x, 0.3) for x in b]
        assert [float(quotient(0.3, x)) for x in a] == [0.3 / x for x in b]
        assert [float(square_root(x)) for x in a] == [math.sqrt(x) for x in b]
        assert bool(alike(a)) == alike(b) == (len(b) == 3)
    for to in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        assert total(map(to, (1e16, 1.0, -1e16))) == 0  # one after the other, uncompensated
        assert usable([to(1.0), to(-9e18)])
        assert not any(usable([to(1.0), to(v)]) for v in (math.nan, math.inf, -math.inf, 1e19))
        assert not alike([to(math.nan), to(math.nan)])
        x = to(2.0)
        assert (where(x == 2, 0.5, x), where(x == 3, 0.5, x)) == (0.5, 2)


def test_what_cannot_be_captured_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"linear_over=9 with capturable=True: .* directions"):
        MeZO(model.parameters(), queries=2, linear_over=9, capturable=True)
    with pytest.raises(ValueError, match=r"AdaZeta cannot do capturable=True: .* directions"):
        AdaZeta(model.parameters(), steps_per_epoch=9, exponent=1.0, capturable=True)
    with pytest.raises(ValueError, match=r"beta=0\.99999 with capturable=True: .* a table"):
        MEAZO(model.parameters(), beta=0.99999, capturable=True)
    with pytest.raises(ValueError, match="warmup_lr=0.1 with capturable=True"):
        AdaMeZO(model.parameters(), warmup_lr=0.1, capturable=True)
    optimizer = make(model, True)
    with pytest.raises(TypeError, match="needs the loss as a tensor on cpu, got float"):
        optimizer.step(lambda: 1.0)
    assert [group["directions"] for group in history(optimizer)] == [[], []]
    optimizer.recorder = print
    with pytest.raises(RuntimeError, match="recorder"):
        optimizer.step(closure_of(model))


def test_a_closure_that_raises_leaves_no_trace_in_the_history():
    def fails():
        raise OSError("no data")

    ends = []
    for failing in (False, True):
        model = make_model()
        model[2].float()  # perturbed and put back, float32 weights here come back to the bit or not
        optimizer = make(model, True)
        for t in range(4):
            if failing and t == 2:
                kept = [p.detach().clone() for p in model.parameters()]
                with pytest.raises(OSError, match="no data"):
                    optimizer.step(fails)
                with torch.no_grad():
                    for p, value in zip(model.parameters(), kept, strict=True):
                        p.copy_(value)
            optimizer.step(lambda model=model: model(torch.ones(4, 7)).square().mean())
        ends.append((bits(model), history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


# --- on a GPU -----------------------------------------------------------------------------------


def captured(optimizer, closure) -> torch.cuda.CUDAGraph:
    """A graph of one step, after as many steps as it takes to warm up: one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step(closure)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(closure)
    return graph


@gpu
@all_cases
def test_a_replayed_step_equals_an_eager_one(case):
    check_replays(case, lambda model: None)


@gpu
@pytest.mark.parametrize("case", ["paper", "MeZO, exact", "ZOAdam", "HiZOO", "HiZOO, exact"])
def test_a_replayed_step_of_staged_weights(case):
    """Weights that are worked on as copies: of those, a graph has the addresses."""

    def turn(model):
        for layer in (model[0], model[2]):
            layer.weight.data = layer.weight.detach().t().contiguous().t()

    check_replays(case, turn)


def check_replays(case, prepare) -> None:
    ends = []
    for replayed in (False, True):
        model = make_model("cuda")
        prepare(model)
        optimizer = make(model, True, case)
        closure = closure_of(model)
        if replayed:
            graph = captured(optimizer, closure)
            for _ in range(8):
                graph.replay()
        else:
            for _ in range(9):
                optimizer.step(closure)
        torch.cuda.synchronize()
        ends.append((bits(model), history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@gpu
def test_a_replayed_step_follows_a_schedule_and_skips():
    ends = []
    for replayed in (False, True):
        model, scale = make_model("cuda"), torch.ones((), device="cuda")
        optimizer = make(model, True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        closure = closure_of(model, scale)
        run = None
        for t in range(6):
            scale.fill_(math.nan if t == 4 else 1.0)
            if replayed and t == 0:
                graph = captured(optimizer, closure)
                run = graph.replay
            elif run is not None:
                run()
            else:
                optimizer.step(closure)
            scheduler.step()
        torch.cuda.synchronize()
        ends.append((bits(model), history(optimizer), int(optimizer.skipped)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert ends[0][2] == 1


@gpu
@pytest.mark.parametrize("case", ["paper", "MeZO, exact", "ZOAdam", "HiZOO, exact"])
def test_what_a_graph_uses_outlives_the_layout(case):
    """Memory that was freed would be given to the tensors that are made in between."""
    ends = []
    for disturbed in (False, True):
        model = make_model("cuda")
        optimizer = make(model, True, case)
        closure = closure_of(model)  # its batch is the caller's to keep alive, as with any graph
        graph = captured(optimizer, closure)
        if disturbed:
            state = optimizer.state_dict()
            with pytest.raises(RuntimeError, match="captured a step.*new optimizer"):
                optimizer.load_state_dict(state)
            optimizer._leave_device()
            optimizer._weights, optimizer._readers = None, None
            gc.collect()
            junk = [torch.full((n,), 7, device="cuda") for n in range(1, 4000, 7)]
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
        if disturbed:
            assert all(bool((t == 7).all()) for t in junk)
        ends.append(bits(model))
    assert same(*ends)


@gpu
def test_a_failed_capture_leaves_nothing_half_done():
    model = make_model("cuda")
    optimizer = make(model, True)
    closure = closure_of(model)
    optimizer.step(closure)
    torch.cuda.synchronize()
    before, kept = bits(model), history(optimizer)

    def fails():
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step(fails)
    torch.cuda.synchronize()
    assert same(before, bits(model))
    assert kept == history(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # there is no graph that it could mislead
    optimizer.step(closure)
