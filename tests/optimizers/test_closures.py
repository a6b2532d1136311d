"""Closures that are no function of the weights alone: their random numbers, and the check."""

from __future__ import annotations

import copy
import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from adamezo import FZOO, HELENE, AdaMeZO, HiZOO, ZOAdaMU, check_closure, cli, finetune
from adamezo.engine.check_closure import REORDERED
from adamezo.integrations.transformers import LabelScorer
from adamezo.runlog import StepLog, read
from helpers.jobs import options

OPTIONS = {"lr": 1e-3, "zo_eps": 1e-2, "seed": 11}
METHODS = {
    "AdaMeZO": (AdaMeZO, {"horizon": 3}),
    "FZOO": (FZOO, {"queries": 3}),
    "HiZOO": (HiZOO, {"alpha": 0.01}),
    "ZOAdaMU": (ZOAdaMU, {}),
}
all_methods = pytest.mark.parametrize("name", METHODS)
perturbations = pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 12)
        self.drop = nn.Dropout(0.4)
        self.norm = nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(self.norm(self.drop(self.lin(x))).tanh())


def built(kind=Net):
    torch.manual_seed(3)
    return kind()


def make(model, name="AdaMeZO", perturbation="inplace", **options):
    method, own = METHODS[name]
    return method.for_model(model, **{**OPTIONS, **own, "perturbation": perturbation, **options})


def loss_of(model, number: int = 0):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 7, generator=generator)
    y = torch.randint(0, 3, (16,), generator=generator)
    return lambda: nn.functional.cross_entropy(model(x), y)


def draws() -> list[float]:
    """An odd number of numpy's normals: it makes two at a time, and keeps the other."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
            torch.rand(()).item()]  # fmt: skip


def generators():
    numpy = np.random.get_state(legacy=False)
    key = {k: np.asarray(v).tolist() for k, v in numpy["state"].items()}
    return random.getstate(), {**numpy, "state": key}, torch.get_rng_state().tolist()


def tensors(model):
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- what a step does with random numbers ---------------------------------------------------------


@perturbations
@all_methods
def test_all_evaluations_see_the_same_numbers_of_python_and_numpy(name, perturbation):
    """And afterwards the generators are as after one evaluation."""
    model = built()
    optimizer = make(model, name, perturbation)
    random.seed(1)
    np.random.seed(1)
    steps = []
    for _ in range(3):
        drawn, loss, before = [], loss_of(model), generators()

        def closure(drawn=drawn, loss=loss):
            drawn.append(draws())
            return loss()

        optimizer.step(closure)
        assert len(drawn) > 1
        assert drawn == [drawn[0]] * len(drawn)
        steps.append(drawn[0])
        after = generators()
        random.setstate(before[0])
        np.random.set_state(before[1])
        draws()
        assert generators()[:2] == after[:2]
    assert steps[0] != steps[1] != steps[2]


@pytest.mark.parametrize("bits", ["MT19937", "PCG64", "Philox", "SFC64"])
def test_numpys_generator_may_be_another_one(bits):
    model = built()
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(getattr(np.random, bits)(5))
    try:
        drawn = []
        make(model, "FZOO").step(lambda: drawn.append(draws()) or loss_of(model)())
    finally:
        np.random.set_bit_generator(before)
    assert drawn == [drawn[0]] * 4


def test_numpys_generator_may_come_into_being_in_the_closure():
    code = """
import sys
from adamezo.engine.generators import ForkedGenerators
assert "numpy.random" not in sys.modules
with ForkedGenerators():
    import numpy
    first = numpy.random.rand()
print(first == numpy.random.rand())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


def test_without_numpy_pythons_generator_is_set_back_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)  # as if it were not installed
    model, drawn = built(), []
    make(model).step(lambda: drawn.append(random.random()) or loss_of(model)())
    assert len(drawn) == 2
    assert len(set(drawn)) == 1


def test_an_error_in_the_first_evaluation_sets_them_back():
    model = built()
    optimizer, before = make(model), generators()

    def closure():
        draws()
        raise LookupError

    with pytest.raises(LookupError):
        optimizer.step(closure)
    assert generators() == before


# --- a closure that is one ------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["every", "last"])
@perturbations
@all_methods
def test_a_check_gives_the_loss_and_leaves_no_trace(name, perturbation, which):
    """With random numbers of all kinds, and running statistics. The run has the bits of one
    without checks."""
    ends = []
    for checked in (False, True):
        model = built()
        optimizer = make(model, name, perturbation)
        optimizer.module_buffers = which
        random.seed(1)
        np.random.seed(1)
        for step in range(4):
            evaluate = loss_of(model, step)

            def closure(evaluate=evaluate):
                return evaluate() * (1 + 0.1 * sum(draws()))

            if checked:
                state, losses = copy.deepcopy(optimizer.state_dict()), optimizer.losses
                before, numbers = tensors(model), generators()
                found = check_closure(optimizer, closure)
                assert same(tensors(model), before)
                assert generators() == numbers
                assert optimizer.losses == losses
                assert optimizer.state_dict()["param_groups"] == state["param_groups"]
                once = copy.deepcopy(model)
                with torch.no_grad():
                    expected = loss_of(once, step)() * (1 + 0.1 * sum(draws()))
                assert type(found) is float
                assert found == expected.item()
                random.setstate(numbers[0])
                np.random.set_state(numbers[1])
                torch.set_rng_state(torch.tensor(numbers[2], dtype=torch.uint8))
            optimizer.step(closure)
        ends.append((tensors(model), generators(), optimizer.losses))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_a_check_of_capturable_steps():
    model = built()
    optimizer = make(model, capturable=True)
    for step in range(3):
        closure = loss_of(model, step)
        before = tensors(model)
        assert check_closure(optimizer, closure) > 0
        assert same(tensors(model), before)
        optimizer.step(closure)
    assert optimizer.state_dict()["param_groups"][0]["steps"] == 3


def test_a_check_of_sampled_labels():
    model = built()
    optimizer = HELENE.for_model(model, curvature="sampled", curvature_every=1, **OPTIONS)
    sampled = loss_of(model, 5)
    assert check_closure(optimizer, sampled) == check_closure(optimizer, sampled)
    assert optimizer.state_dict()["param_groups"][0]["steps"] == 0


@perturbations
def test_a_check_between_the_steps_of_a_log(tmp_path, perturbation):
    model = built().eval()
    optimizer = make(model, perturbation=perturbation)
    with StepLog.create(tmp_path / "log", optimizer):
        for step in range(3):
            check_closure(optimizer, loss_of(model, step))
            optimizer.step(loss_of(model, step))
    assert read(tmp_path / "log").steps == 3
    assert len(read(tmp_path / "log").records) == 3


def test_modules_train_afterwards_that_trained_before():
    model = built()
    model.out.eval()
    evaluate = loss_of(model)

    def closure():
        model.eval()
        model.out.train()
        return evaluate()

    check_closure(make(model), closure)
    assert [m.training for m in model.modules()] == [True, True, True, True, False]


def test_a_check_without_the_model():
    model = built()
    check_closure(AdaMeZO(model.parameters(), **OPTIONS), loss_of(model))
    assert model.norm.num_batches_tracked == 2  # nobody knows whose they are


# --- closures that are none -----------------------------------------------------------------------


def batches_of(model):
    batches = itertools.count()
    return lambda: loss_of(model, next(batches))()


def own_torch_generator(model):
    generator = torch.Generator().manual_seed(0)
    return lambda: loss_of(model)() + torch.rand((), generator=generator)


def own_numpy_generator(model):
    generator = np.random.default_rng(0)
    return lambda: loss_of(model)() + generator.random()


def own_python_generator(model):
    generator = random.Random(0)
    return lambda: loss_of(model)() + generator.random()


def mode(model):
    evaluate = loss_of(model)

    def closure():
        loss = evaluate()
        model.train(not model.training)
        return loss

    return closure


BAD = [batches_of, own_torch_generator, own_numpy_generator, own_python_generator, mode]


@perturbations
@pytest.mark.parametrize("bad", BAD)
def test_other_closures_are_refused(bad, perturbation):
    model = built()
    optimizer = make(model, perturbation=perturbation)
    before, numbers = tensors(model), generators()
    with pytest.raises(ValueError, match=r"at the same weights.*Look for: a batch.*default_rng"):
        check_closure(optimizer, bad(model))
    assert same(tensors(model), before)
    assert generators() == numbers
    assert all(m.training for m in model.modules())


def test_the_message_has_the_numbers():
    model = built()
    losses = itertools.cycle([0.75, 1.0])
    with pytest.raises(ValueError, match=r"the loss 0\.75 and then 1\.0 at") as error:
        check_closure(make(model, zo_eps=2.0**-7), lambda: next(losses))
    allowed = 64 * 2.0**-23
    assert f"They differ by 0.25, expected {allowed:.3g} at most" in str(error.value)
    assert "difference / (2 zo_eps) = 16 into the projected gradient" in str(error.value)


class Counting(nn.Module):
    """What it gives depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.lin(x) * self.calls


def test_a_module_buffer_that_the_loss_depends_on():
    model = built(Counting)
    optimizer = make(model)
    with pytest.raises(ValueError, match=r"buffers that it writes \(calls\).*module_buffers = 'la"):
        check_closure(optimizer, loss_of(model))
    optimizer.module_buffers = "last"
    check_closure(optimizer, loss_of(model))
    with pytest.raises(ValueError, match="at the same weights") as error:
        check_closure(optimizer, batches_of(model))
    assert "module_buffers" not in str(error.value)  # that is done


EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        (float, REORDERED),
        (torch.float64, REORDERED),
        (torch.float32, REORDERED),
        (torch.float16, 2.0**-10),
        (torch.bfloat16, 2.0**-7),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_another_order_of_the_sums_is_no_other_loss(kind, unit, sign):
    """Both sides of the tolerance: one unit, and the next number of the type above it."""
    assert unit == 64 * EPS or unit == torch.finfo(kind).eps
    next_place = EPS if kind in (float, torch.float64) else torch.finfo(kind).eps
    optimizer = make(built())
    for beyond, refused in ((0.0, False), (2 * next_place, True)):
        second = sign * (1 + unit + beyond)
        values = [sign * 1.0, second]
        if kind is not float:
            values = [torch.tensor(value, dtype=kind) for value in values]
            assert values[1].item() == second
        for ordered in (values, values[::-1]):
            given = iter(ordered)
            if refused:
                with pytest.raises(ValueError, match="expected .* at most"):
                    check_closure(optimizer, lambda given=given: next(given))
            else:
                found = check_closure(optimizer, lambda given=given: next(given))
                assert found == float(ordered[0])


def test_the_tolerance_may_be_another_one():
    optimizer = make(built())
    check_closure(optimizer, iter([2.0, 2.5]).__next__, tolerance=0.2)
    with pytest.raises(ValueError, match=r"expected 0\.475 at most"):
        check_closure(optimizer, iter([2.0, 2.5]).__next__, tolerance=0.19)
    check_closure(optimizer, lambda: 2.0, tolerance=0.0)
    with pytest.raises(ValueError, match="expected 0 at most"):
        check_closure(optimizer, iter([1.0, 1.0 + 2.0**-52]).__next__, tolerance=0.0)


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.inf, 1.0, False),
        (math.inf, -math.inf, False),
        (0.0, -0.0, True),
        (0.0, 1e-300, False),
    ],
)
def test_losses_that_are_no_numbers(first, second, alike):
    """A step would skip them; that is another matter."""
    optimizer, given = make(built()), iter([first, second])
    if alike:
        found = check_closure(optimizer, given.__next__)
        assert found == first or math.isnan(found)
    else:
        with pytest.raises(ValueError, match="the loss .* and then"):
            check_closure(optimizer, given.__next__)


# --- what goes wrong in a closure -----------------------------------------------------------------


@perturbations
@pytest.mark.parametrize("failing", [0, 1])
def test_errors_go_on_to_the_caller_and_leave_no_trace(perturbation, failing):
    model = built()
    optimizer = make(model, perturbation=perturbation)
    before, numbers, calls = tensors(model), generators(), []

    def closure(error):
        loss = loss_of(model)()
        draws()
        model.eval()
        calls.append(loss)
        if len(calls) == failing + 1:
            if error is TypeError:
                return None
            if error is RuntimeError:
                model.lin.weight.data = torch.zeros(1)
            else:
                raise error
        return loss

    for error in (LookupError, KeyboardInterrupt, TypeError, RuntimeError):
        calls.clear()
        with pytest.raises(error):
            check_closure(optimizer, lambda error=error: closure(error))
        assert len(calls) == failing + 1
        assert same(tensors(model), before)
        assert generators() == numbers
        assert all(m.training for m in model.modules())


def test_a_closure_that_writes_to_weights_is_refused_by_name():
    model = built()

    def closure():
        model.lin.bias.add_(0.0)
        return loss_of(model)()

    with pytest.raises(RuntimeError, match=r"the closure has written to lin\.bias"):
        check_closure(make(model), closure)


def test_with_exact_perturbation_it_sees_what_a_step_would_refuse():
    model = built()
    with pytest.raises(RuntimeError, match=r"lin\.weight is read outside of all modules"):
        check_closure(
            make(model, perturbation="out_of_place"),
            lambda: loss_of(model)() + model.lin.weight.sum(),
        )


# --- the job --------------------------------------------------------------------------------------


def test_the_job_checks_its_loss_once_before_the_first_step(
    model_folder,
    data_file,
    tmp_path,
    monkeypatch,
):
    checks = []

    def counted(optimizer, closure):
        checks.append([group["steps"] for group in optimizer.param_groups])
        return check_closure(optimizer, closure)

    monkeypatch.setattr(finetune.run, "check_closure", counted)
    job = {"log": str(tmp_path / "log")}
    finetune.finetune(options(model_folder, data_file, steps=2, **job))
    assert checks == [[0]]
    resumed = finetune.finetune(options(model_folder, data_file, steps=4, **job))
    assert checks == [[0], [2]]
    assert resumed["training"]["forward_passes"] == 2 * 2  # those of the check are not training
    finetune.finetune(options(model_folder, data_file, steps=4, **job))  # replays, and that is all
    assert len(checks) == 2


def test_the_job_does_not_train_on_a_loss_that_changes(
    model_folder,
    data_file,
    tmp_path,
    monkeypatch,
    capsys,
):
    score, calls = LabelScorer.__call__, itertools.count(1)
    monkeypatch.setattr(
        LabelScorer, "__call__", lambda self, prompts: score(self, prompts) * next(calls)
    )
    log = tmp_path / "log"
    arguments = ["finetune", "--model", str(model_folder), "--data", str(data_file),
                 "--label-words", "negative=terrible", "positive=great", "--held-out", "10",
                 "--batch-size", "4", "--log", str(log), "--output", str(tmp_path)]  # fmt: skip
    assert cli.main(arguments) == 1
    assert "at the same weights" in capsys.readouterr().err
    assert read(log).records == ()
