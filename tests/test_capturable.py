"""Steps whose numbers stay on the device: the bits of ordinary ones, and nothing read back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import needs_native
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adamezo import AdaMeZO

SEED = 0x13198A2E03707344


def gpu(test):
    """For `make gpu-check`."""
    no_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(no_device(test))


OPTIONS = {"lr": 0.01, "zo_eps": 1e-2, "horizon": 4, "seed": SEED}
CASES = {
    "paper": {},
    "bias corrected": {"normalization": "bias_corrected", "weight_decay": 0.1},
    "official": {"normalization": "official", "lr": 1e-4},
    "momentum, ascending": {"betas": (0.8, 0.0), "maximize": True},
    "MeZO": {"betas": (0.0, 0.0), "horizon": 1},
    "no first beta": {"betas": (0.0, 0.9)},
    "signs": {"distribution": "rademacher"},
}


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


def make(model: nn.Module, capturable: bool, **options) -> AdaMeZO:
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.02},
        {"params": list(model[2].parameters())},
    ]
    return AdaMeZO(groups, **{**OPTIONS, **options}, capturable=capturable)


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().cpu().view(torch.uint8).clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def history(optimizer: AdaMeZO) -> list[dict]:
    names = ("directions", "projected_grads", "steps", "next_direction")
    return [{n: g[n] for n in names} for g in optimizer.state_dict()["param_groups"]]


class ReadBacks(TorchDispatchMode):
    """Counts what makes a program wait for the numbers of a device."""

    waits = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.waits:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_capturable_run_has_the_bits_of_an_ordinary_one(options):
    ends = []
    for capturable in (False, True):
        model = make_model()
        optimizer = make(model, capturable, **options)
        results = []
        for _ in range(9):
            mean = optimizer.step(closure_of(model))
            results.append((mean.item(), float(optimizer.projected_grad)))
        ends.append((bits(model), results, history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert not same(ends[0][0], bits(make_model()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_non_finite_loss_is_skipped_on_the_device(value):
    ends = []
    for capturable in (False, True):
        model, scale = make_model(), torch.ones(())
        optimizer = make(model, capturable)
        closure = closure_of(model, scale)
        for t in range(8):
            scale.fill_(value if t in (0, 3, 4) else 1.0)
            if capturable or t:
                optimizer.step(closure)
            else:
                with pytest.warns(RuntimeWarning, match="skipped"):
                    optimizer.step(closure)
        ends.append((bits(model), int(optimizer.skipped), history(optimizer)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert ends[1][1] == 3


@needs_native
def test_nothing_is_read_back():
    model = make_model()
    optimizer = make(model, True)
    closure = closure_of(model)
    optimizer.step(closure)  # puts the numbers on the device
    with ReadBacks() as reads:
        for _ in range(3):
            optimizer.step(closure)
    assert reads.seen == []
    with ReadBacks() as reads:  # the detector detects
        optimizer.projected_grad.item()
    assert reads.seen == ["_local_scalar_dense"]


@needs_native
def test_an_ordinary_step_reads_once(monkeypatch):
    model = make_model()
    optimizer = make(model, False)
    closure = closure_of(model)
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, real=real, name=name):
            reads.append(name)
            return real(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    optimizer.step(closure)
    assert reads == ["tolist"]


def test_the_learning_rate_is_read_at_each_step():
    ends = []
    for capturable in (False, True):
        model = make_model()
        optimizer = make(model, capturable)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        for _ in range(5):
            optimizer.step(closure_of(model))
            scheduler.step()
        ends.append(bits(model))
        if capturable:
            assert all(isinstance(g["lr"], torch.Tensor) for g in optimizer.param_groups)
    assert same(*ends)


def test_a_state_goes_from_capturable_to_ordinary_and_back():
    straight = make_model()
    optimizer = make(straight, False)
    for _ in range(9):
        optimizer.step(closure_of(straight))
    model, state = make_model(), None
    for capturable in (True, False, True):
        optimizer = make(model, capturable)
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


def test_what_cannot_be_captured_is_refused():
    model = make_model()
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
        model[2].float()  # displaced and put back, float32 weights here come back to the bit or not
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


def captured(optimizer: AdaMeZO, closure) -> torch.cuda.CUDAGraph:
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
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_replayed_step_equals_an_eager_one(options):
    ends = []
    for replayed in (False, True):
        model = make_model("cuda")
        optimizer = make(model, True, **options)
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
    optimizer.step(closure)
