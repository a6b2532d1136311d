"""What can go wrong in and around a step, and that the weights come back from it."""

from __future__ import annotations

import copy
import math
import random
import signal
import threading

import pytest
import torch
from torch import nn

import stress as attacks
from adamezo import AdaMeZO
from adamezo.engine.signals import HeldSignals
from stress import came_back, history, loss_of, make_optimizer, same_bits, small, values

MODES = pytest.mark.parametrize("exact", [False, True], ids=["inplace", "out_of_place"])


# --- interruptions: small counts of what tests.stress does thousands of times -------------------


@MODES
def test_errors_inside_the_model(exact):
    assert attacks.interrupted_inside(60, exact, seed=1).total() == 60


@MODES
def test_signals_at_random_times(exact):
    seen = attacks.interrupted_by_signals(40, exact, seed=1)
    assert seen["step undone"] + seen["step complete"] >= 40
    assert seen["step undone"] >= 5


def test_bad_input():
    assert attacks.bad_inputs(300, seed=1).total() == 300
    attacks.closures_that_write(20, seed=1)


def test_the_attacks_see_what_they_are_for(monkeypatch):
    """Weights that do not come back, and an optimizer that accepts everything."""
    monkeypatch.setattr("adamezo.engine.perturb.inplace.InPlace.restore", lambda self: None)
    with pytest.raises(SystemExit, match="weights are lost"):
        attacks.interrupted_inside(20, exact=False)
    monkeypatch.undo()
    monkeypatch.setattr("adamezo.engine.evaluation.checked_loss", lambda loss: 1.0)
    with pytest.raises(SystemExit, match="a bad loss was accepted"):
        attacks.bad_inputs(100)


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def handled():
    """Sets a handler of a signal for the length of a test."""
    before = {}

    def set_handler(number, handler):
        before.setdefault(number, signal.signal(number, handler))

    yield set_handler
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_handler_that_does_not_raise_runs_at_once_in_the_closure_and_later_elsewhere(handled):
    log = []
    handled(signal.SIGUSR1, lambda *arguments: log.append("handled"))
    with HeldSignals() as signals:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        log.append("held")
        with signals.through():
            log.append("open")
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        log.append("held again")
    assert log == ["held", "handled", "open", "handled", "handled", "held again", "handled"]


def test_after_a_handler_has_raised_the_way_out_is_not_disturbed(handled):
    log = []

    def handler(*arguments):
        log.append("handled")
        raise TimeoutError

    handled(signal.SIGUSR1, handler)

    def left_by_the_first():
        with HeldSignals() as signals:
            try:
                with signals.through():
                    signal.raise_signal(signal.SIGUSR1)
            finally:
                signal.raise_signal(signal.SIGUSR1)
                log.append("cleaned up")

    with pytest.raises(TimeoutError):
        left_by_the_first()
    assert log == ["handled", "cleaned up", "handled"]
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_all_that_waited_are_handled_even_if_one_raises(handled):
    log = []

    def handler(number, frame):
        log.append(number)
        raise TimeoutError

    handled(signal.SIGUSR1, handler)
    handled(signal.SIGUSR2, lambda number, frame: log.append(number))

    def both():
        with HeldSignals():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR2)
            assert not log

    with pytest.raises(TimeoutError):
        both()
    assert sorted(log) == sorted([signal.SIGUSR1, signal.SIGUSR2])


def test_a_handler_set_by_the_closure_stays(handled):
    handled(signal.SIGUSR1, lambda *arguments: None)
    new = lambda *arguments: None  # noqa: E731
    with HeldSignals() as signals, signals.through():
        signal.signal(signal.SIGUSR1, new)
    assert signal.getsignal(signal.SIGUSR1) is new


def test_signals_that_python_does_not_handle_and_other_threads_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with HeldSignals():
        assert signal.getsignal(signal.SIGTERM) is before
    seen = []

    def elsewhere():
        with HeldSignals() as signals, signals.through():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


# --- closures that touch the weights --------------------------------------------------------------


def touched(model: nn.Module, touch, exact: bool, evaluation: int = 1):
    """A step whose closure does ``touch`` to the last weight, and the error."""
    optimizer = make_optimizer(model, exact)
    optimizer.step(loss_of(model))
    before, kept, records = values(model), history(optimizer), []
    optimizer.recorder = records.append
    count = iter(range(1, 3))

    def closure():
        loss = loss_of(model)()
        if next(count) == evaluation:
            touch(model.out.weight)
        return loss

    with pytest.raises(RuntimeError) as error:
        optimizer.step(closure)
    assert history(optimizer) == kept
    return before, str(error.value), records, optimizer


@MODES
@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize(
    ("touch", "reads"),
    [
        (lambda p: setattr(p, "data", p.data.clone()), True),
        (lambda p: setattr(p, "data", p.data.half()), True),
        (lambda p: setattr(p, "data", torch.zeros(3)), False),
    ],
    ids=["replaced", "cast", "resized"],
)
def test_weights_that_a_closure_replaces_are_put_back(touch, reads, evaluation, exact):
    model = small()
    place = model.out.weight.data_ptr()
    before, message, records, optimizer = touched(model, touch, exact, evaluation)
    if exact and reads:  # what it is replaced by is made from it, which exact perturbation refuses
        assert "out.weight is read outside of all modules" in message
    else:
        assert "replaced, resized or moved (what they were is put back) out.weight" in message
    assert model.out.weight.data_ptr() == place
    assert came_back(before, values(model), 1, exact)
    assert [record.outcome for record in records] == ([] if exact else ["failed"])
    optimizer.step(loss_of(model))  # and the run goes on


@MODES
def test_a_closure_that_writes_to_weights_is_told(exact):
    model = small()
    _, message, records, _ = touched(model, lambda p: p.add_(1), exact)
    if exact and not records:  # the step was watched
        assert "out.weight" in message
    else:
        assert "has written to out.weight" in message
        assert [record.outcome for record in records] == ["broken"]


def test_writing_and_then_failing_is_not_a_step_that_can_be_replayed():
    model = small()
    optimizer = make_optimizer(model, exact=False)
    records = []
    optimizer.recorder = records.append

    def closure():
        with torch.no_grad():
            model.norm.weight.add_(1)
        raise LookupError

    with pytest.raises(LookupError):
        optimizer.step(closure)
    assert [record.outcome for record in records] == ["broken"]


def test_a_batch_norm_and_a_frozen_weight_may_be_written_by_the_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[2].bias.requires_grad_(False)
    optimizer = AdaMeZO(model.parameters(), lr=1e-3)

    def closure():
        model[2].bias.add_(1)
        return model(torch.ones(5, 3)).square().mean()

    optimizer.step(closure)
    assert optimizer.param_groups[0]["steps"] == 1


# --- weights that change between steps ------------------------------------------------------------


@MODES
def test_a_weight_of_another_size_is_refused_until_it_has_its_own_back(exact):
    model = small()
    optimizer = make_optimizer(model, exact)
    optimizer.step(loss_of(model))
    before, kept = values(model), history(optimizer)
    data = model.out.weight.data
    for other in (torch.zeros(5, 34), torch.zeros(165)):
        model.out.weight.data = other
        with pytest.raises(ValueError, match=r"out\.weight has shape .* and had \(5, 33\)"):
            optimizer.step(lambda: 1.0)
    model.out.weight.data = data
    assert same_bits(before, values(model))
    assert history(optimizer) == kept
    optimizer.step(loss_of(model))
    model.out.weight = nn.Parameter(torch.zeros(5, 34))  # not the optimizer's any more
    if not exact:
        optimizer.step(lambda: 1.0)
    optimizer.param_groups[0]["params"][-2] = model.out.weight
    with pytest.raises(ValueError, match=r"out\.weight has shape \(5, 34\) and had \(5, 33\)"):
        optimizer.step(lambda: 1.0)


def test_a_weight_whose_memory_was_freed_is_refused():
    """As sharding libraries do between steps."""
    model = small()
    optimizer = make_optimizer(model, exact=False)
    optimizer.step(loss_of(model))
    storage = model.out.weight.untyped_storage()
    size, kept = storage.size(), model.out.weight.detach().clone()
    storage.resize_(0)
    with pytest.raises(ValueError, match=r"out\.weight has no memory"):
        optimizer.step(lambda: 1.0)
    storage.resize_(size)
    with torch.no_grad():
        model.out.weight.copy_(kept)
    optimizer.step(loss_of(model))


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distribution", "rademacher"),
        ("normalization", "official"),
        ("method", "MeZO"),
        ("stream_version", 2),
    ],
)
def test_a_state_that_the_run_cannot_go_on_with_says_what_differs(name, value):
    model = small()
    optimizer = make_optimizer(model, exact=False)
    optimizer.step(loss_of(model))
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    state["param_groups"][0][name] = value
    state["param_groups"][0]["lr"] = 0.5
    message = f"group 0 of the state has {name} {value!r}, this optimizer has "
    with pytest.raises(ValueError, match=message + f"{before['param_groups'][0][name]!r}"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


def test_options_that_may_change_come_with_the_state():
    model = small()
    state = make_optimizer(model, exact=False).state_dict()
    state["param_groups"][0].update(lr=0.5, betas=[0.1, 0.2], zo_eps=0.3, seed=9, horizon=2)
    optimizer = make_optimizer(model, exact=False)
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["horizon"]) == (0.5, [0.1, 0.2], 2)
    optimizer.step(loss_of(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(projected_grads=[math.nan]), "projected_grads \\[nan\\]"),
        (lambda g: g.update(directions=[5]), "damaged: its directions are \\[5\\]"),
        (lambda g: g.update(next_direction=-1), "next_direction is -1"),
        (lambda g: g.update(steps=True), "steps is True"),
        (lambda g: g.update(horizon="10"), "Invalid horizon"),
        (lambda g: g.update(eps=None), "group 0 of the state: Invalid eps: None"),
        (lambda g: g.pop("seed"), "lacks seed"),
        (lambda g: g.pop("method"), "lacks method"),
        (lambda g: g.update(params=[0]), "doesn't match the size"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    model = small()
    optimizer = make_optimizer(model, exact=False)
    optimizer.step(loss_of(model))
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    change(state["param_groups"][0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("state", [None, 3, [], {}, {"state": {}}, {"param_groups": []}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="."):
        make_optimizer(small(), exact=False).load_state_dict(state)


def test_states_that_were_edited():
    seen = attacks.fuzz_states(1500, seed=1)
    assert seen.total() == 1500
    assert min(seen["loaded"], seen["refused"]) > 20


def test_bad_states_of_the_attack_are_bad():
    """Otherwise a state that is refused for another reason would count."""
    chosen, optimizer = random.Random(0), make_optimizer(small(), exact=False)
    states = [attacks.bad_state(optimizer, chosen) for _ in range(50)]
    assert all(state != optimizer.state_dict() for state in states)
