"""Buffers that evaluations write, as BatchNorm's: which ones move them, and what a log says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from adamezo import FZOO, HELENE, AdaMeZO, HiZOO, MeZO
from adamezo.runlog import LogError, StepLog, optimizer_for, read, replay
from helpers.backends import needs_native
from helpers.reads import ReadBacks

OPTIONS = {"lr": 1e-3, "zo_eps": 1e-2, "seed": 11}
METHODS = {  # with how many evaluations a step has
    "AdaMeZO": (AdaMeZO, {"horizon": 3}, 2),
    "MeZO, 2 directions": (MeZO, {"queries": 2}, 4),
    "FZOO, 3 directions": (FZOO, {"queries": 3}, 4),  # the first of them at theta
    "HiZOO": (HiZOO, {"alpha": 0.01}, 3),  # the first at theta
}
all_methods = pytest.mark.parametrize("name", METHODS)
perturbations = pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])


class Dense(nn.Module):
    """Dropout before the norm: its statistics depend on the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 12)
        self.drop = nn.Dropout(0.4)
        self.norm = nn.BatchNorm1d(12)
        self.tied = self.norm
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(self.norm(self.drop(self.lin(x))).tanh())


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2)
        self.norm = nn.BatchNorm2d(4, momentum=None)  # a mean over all batches, by their number
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.conv(x[:, :4].reshape(-1, 1, 2, 2)))
        return self.out(nn.functional.dropout(x.flatten(1), 0.3, self.training))


def make(model, name="AdaMeZO", perturbation="inplace", **options):
    method, own, _ = METHODS[name]
    options = {**OPTIONS, **own, "perturbation": perturbation, **options}
    return method.for_model(model, **options)


def built(kind=Dense):
    torch.manual_seed(3)
    return kind()


def loss_of(model, number: int = 0):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 7, generator=generator)
    y = torch.randint(0, 3, (16,), generator=generator)
    return lambda: nn.functional.cross_entropy(model(x), y)


def values(tensors):
    return [t.detach().clone() for t in tensors]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def buffers(model):
    return values(model.buffers())


class Seen:
    """What a norm was given in each evaluation, in train mode."""

    def __init__(self, norm: nn.Module) -> None:
        self.inputs: list[torch.Tensor] = []
        norm.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0].clone()))


# --- which evaluations move them ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Dense, Images])
@perturbations
@all_methods
def test_after_a_step_they_are_as_after_its_last_evaluation(name, perturbation, kind):
    model = built(kind)
    objects = [id(buffer) for buffer in model.buffers()]
    twin, every = copy.deepcopy(model.norm), copy.deepcopy(model.norm)
    optimizer = make(model, name, perturbation)
    optimizer.module_buffers = "last"
    seen = Seen(model.norm)
    count = METHODS[name][2]
    for step in range(5):
        optimizer.step(loss_of(model, step))
        assert len(seen.inputs) == count * (step + 1)
        twin(seen.inputs[-1])
    for x in seen.inputs:
        every(x)
    assert same(buffers(model.norm), buffers(twin))
    assert model.norm.num_batches_tracked == 5
    assert [id(buffer) for buffer in model.buffers()] == objects
    # And by hand, from the formula: 1 / number of batches, or the momentum, for the newest.
    mean = torch.zeros_like(model.norm.running_mean, dtype=torch.float64)
    for number, x in enumerate(seen.inputs[count - 1 :: count], start=1):
        share = model.norm.momentum or 1 / number
        dimensions = [d for d in range(x.dim()) if d != 1]
        mean = (1 - share) * mean + share * x.double().mean(dimensions)
    torch.testing.assert_close(model.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    assert not same(buffers(twin), buffers(every))  # so the others would have been seen


@perturbations
@all_methods
def test_that_changes_neither_weights_nor_losses(name, perturbation):
    """In train mode nothing reads the running statistics. Random numbers are those of one
    evaluation either way."""
    ends = []
    for which in ("every", "last"):
        model = built()
        optimizer = make(model, name, perturbation)
        optimizer.module_buffers = which
        losses = []
        for step in range(4):
            optimizer.step(loss_of(model, step))
            losses.append(optimizer.losses)
        count = 1 if which == "last" else METHODS[name][2]
        assert model.norm.num_batches_tracked == 4 * count
        ends.append((values(model.parameters()), losses, torch.get_rng_state().tolist()))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_sampled_labels_are_evaluations_too():
    model = built()
    optimizer = HELENE.for_model(model, curvature="sampled", curvature_every=1, **OPTIONS)
    optimizer.module_buffers = "last"
    for step in range(3):
        optimizer.step(loss_of(model, step), loss_of(model, step + 10))
        assert len(optimizer.losses) == 4
    assert model.norm.num_batches_tracked == 3


@perturbations
@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, "no loss", "a write"])
@pytest.mark.parametrize("failing", [0, 1, 3])
def test_after_a_step_that_failed_they_are_what_they_were(failing, error, perturbation):
    model = built()
    optimizer = make(model, "MeZO, 2 directions", perturbation)
    optimizer.module_buffers = "last"
    optimizer.step(loss_of(model))
    before, objects = buffers(model), [id(buffer) for buffer in model.buffers()]
    calls = []

    def closure():
        loss = loss_of(model)()
        calls.append(loss)
        if len(calls) == failing + 1:
            if error == "no loss":
                return None
            if error == "a write":
                model.lin.bias.add_(1)
            else:
                raise error
        return loss

    expected = {"no loss": TypeError, "a write": RuntimeError}.get(error, error)
    with pytest.raises(expected):
        optimizer.step(closure)
    assert len(calls) == failing + 1
    assert same(buffers(model), before)
    assert [id(buffer) for buffer in model.buffers()] == objects
    optimizer.step(loss_of(model))
    assert model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("capturable", [False, True])
def test_a_skipped_step_is_over_like_others(capturable):
    """On a device nobody would know that it was skipped."""
    model = built()
    optimizer = make(model, capturable=capturable)
    optimizer.module_buffers = "last"
    loss = loss_of(model)
    optimizer.step(loss)
    if capturable:
        optimizer.step(lambda: loss() * torch.nan)
    else:
        with pytest.warns(RuntimeWarning, match="skipped"):
            optimizer.step(lambda: loss() * torch.nan)
    assert int(optimizer.skipped) == 1
    assert model.norm.num_batches_tracked == 2


@needs_native  # the reference reads
@all_methods
def test_on_a_device_nothing_is_read_back(name):
    ends = []
    for capturable in (False, True):
        model = built()
        optimizer = make(model, name, capturable=capturable)
        optimizer.module_buffers = "last"
        for step in range(4):
            closure = loss_of(model, step)
            with ReadBacks() as reads:
                optimizer.step(closure)
            if capturable and step:  # the first one puts the numbers on the device
                assert not set(reads.seen) & set(ReadBacks.waits)
        assert model.norm.num_batches_tracked == 4
        ends.append((values(model.parameters()), buffers(model)))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


# --- the attribute --------------------------------------------------------------------------------


def test_it_needs_the_model_and_one_of_two_words():
    model = built()
    optimizer = AdaMeZO(model.parameters(), **OPTIONS)
    assert optimizer.module_buffers == "every"
    with pytest.raises(ValueError, match="Invalid module_buffers: 'first', expected one of"):
        optimizer.module_buffers = "first"
    optimizer.module_buffers = "last"
    before, state = values(model.parameters()), copy.deepcopy(optimizer.state_dict())

    def closure():
        raise AssertionError("it was evaluated")

    with pytest.raises(ValueError, match="module_buffers='last' needs the model"):
        optimizer.step(closure)
    assert same(values(model.parameters()), before)
    assert optimizer.state_dict() == state
    optimizer.model = model
    optimizer.step(loss_of(model))
    assert model.norm.num_batches_tracked == 1


def test_it_is_no_option_and_not_saved():
    model = built()
    optimizer = make(model)
    plain = copy.deepcopy(optimizer.state_dict())
    optimizer.module_buffers = "last"
    assert optimizer.state_dict() == plain
    optimizer.load_state_dict(plain)
    assert optimizer.module_buffers == "last"
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.module_buffers == "every"


# --- buffers of other kinds -----------------------------------------------------------------------


class Odd(nn.Module):
    """Buffers of its own: written, replaced, made and removed in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 3)
        memory = torch.zeros(6)
        self.register_buffer("left", memory[:4])
        self.register_buffer("right", memory[2:])  # the two share memory
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("moved", torch.zeros(2))
        self.register_buffer("absent", None)
        self.register_buffer("removed", torch.ones(1))
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.register_buffer("thin", torch.eye(2).to_sparse())

    def forward(self, x):
        y = self.lin(x)
        self.left.add_(1)
        self.right.mul_(2).add_(1)
        self.count += 1
        self.average = 0.5 * self.average + y.detach().mean(0)
        self.moved.data = torch.cat([self.moved, self.moved + 1])  # another shape
        self.absent = self.count.clone()
        self.register_buffer("made", self.count + 10, persistent=False)
        if "removed" in self._buffers:
            del self.removed
        self.sparse.mul_(2)
        self.thin = self.thin * 2
        return y


def test_replaced_made_and_removed_ones_are_put_back_too():
    model, once = built(Odd), built(Odd)
    optimizer = make(model, "MeZO, 2 directions")
    optimizer.module_buffers = "last"
    objects = dict(model._buffers)
    before = {name: None if b is None else b.clone() for name, b in objects.items()}
    calls = []

    def closure():
        calls.append(set(model._buffers))
        loss = loss_of(model)()
        if len(calls) == 3:
            raise LookupError
        return loss

    with pytest.raises(LookupError):
        optimizer.step(closure)
    assert calls == [set(objects)] * 3
    assert dict(model._buffers).keys() == objects.keys()
    for name, buffer in objects.items():
        assert model._buffers[name] is buffer
        assert buffer is None or torch.equal(buffer.to_dense(), before[name].to_dense())

    optimizer.step(loss_of(model))
    with torch.no_grad():
        loss_of(once)()
    assert model._buffers.keys() == once._buffers.keys()
    for name, buffer in model._buffers.items():
        if name != "average":  # that one is of the perturbed weights
            assert torch.equal(buffer.to_dense(), once._buffers[name].to_dense()), name
    assert model.left.tolist() == [1, 1, 3, 3]
    assert not torch.equal(model.average, torch.zeros(3))


@perturbations
def test_a_buffer_over_the_memory_of_a_weight_is_the_weight(perturbation):
    """To put it back would move the weight, which a step in place has perturbed."""
    ends = []
    for alias in (False, True):
        model = built()
        optimizer = make(model, perturbation=perturbation)
        optimizer.module_buffers = "last"
        if alias:
            model.register_buffer("alias", model.out.weight.data[1:])
            model.register_buffer("parameter", model.lin.bias)
        for step in range(3):
            optimizer.step(loss_of(model, step))
        assert model.norm.num_batches_tracked == 3
        ends.append(values(model.parameters()))
    assert same(*ends)


def test_a_buffer_that_is_not_there_yet_is_refused_by_name():
    model = nn.Sequential(nn.Linear(7, 4), nn.LazyBatchNorm1d(affine=False))
    optimizer = make(model)
    optimizer.module_buffers = "last"
    with pytest.raises(ValueError, match=r"1\.running_mean has no shape yet.*evaluate the model"):
        optimizer.step(loss_of(model))
    loss_of(model)()
    optimizer.step(loss_of(model))
    assert model[1].num_batches_tracked == 2


def test_a_closure_may_return_a_buffer():
    """Its value is read before it is put back."""
    model = built()
    model.register_buffer("loss", torch.zeros(()))
    losses = []
    for which in ("every", "last"):
        optimizer = make(model, lr=0.0, perturbation="out_of_place")
        optimizer.module_buffers = which
        torch.manual_seed(0)
        optimizer.step(lambda: model.loss.copy_(loss_of(model)()))
        losses.append(optimizer.losses)
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    assert model.norm.num_batches_tracked == 2 + 1


# --- logs -----------------------------------------------------------------------------------------


both = pytest.mark.parametrize("which", ["every", "last"])


def replayed(path, model):
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = read(path)
    replay(log, optimizer_for(log.header, base))
    return list(base.values())


@both
def test_a_log_is_not_begun_where_running_statistics_move(tmp_path, which):
    model = built()
    optimizer = make(model)
    optimizer.module_buffers = which
    path = tmp_path / "log"
    with pytest.raises(LogError, match=r"running statistics of norm\. .*module_buffers='ignore'"):
        StepLog.create(path, optimizer)
    assert list(tmp_path.iterdir()) == []
    assert optimizer.recorder is None
    model.eval()
    before = buffers(model)
    with StepLog.create(path, optimizer) as log:
        for step in range(3):
            optimizer.step(loss_of(model, step))
        assert log.steps == 3
    assert same(buffers(model), before)
    assert same(replayed(path, built()), values(model.parameters()))
    # Nor is it gone on with.
    other = built()
    going_on, data, start = make(other), path.read_bytes(), values(other.parameters())
    with pytest.raises(LogError, match=r"running statistics of norm\. "):
        StepLog.resume(path, going_on)
    assert same(values(other.parameters()), start)
    assert path.read_bytes() == data
    other.eval()
    with StepLog.resume(path, going_on):
        going_on.step(loss_of(other))
    assert read(path).steps == 4


def test_norms_without_running_statistics_are_logged_in_train_mode(tmp_path):
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5, track_running_stats=False))
    optimizer = make(model)
    with StepLog.create(tmp_path / "log", optimizer) as log:
        optimizer.step(loss_of(model))
        assert log.steps == 1
    model.append(nn.BatchNorm1d(5, affine=False))
    with pytest.raises(LogError, match="running statistics of 2"):
        StepLog.create(tmp_path / "other", optimizer)


@both
@perturbations
def test_the_first_step_that_writes_them_says_so(tmp_path, perturbation, which):
    """Where the closure goes to train mode itself. Weights and log are those of that step."""
    model, path = built(), tmp_path / "log"
    model.eval()
    optimizer = make(model, perturbation=perturbation)
    optimizer.module_buffers = which
    calls = []

    def closure():
        calls.append(model.train())
        return loss_of(model)()

    with StepLog.create(path, optimizer) as log:
        optimizer.step(loss_of(model))
        message = (
            r"this step have written norm\.running_mean, norm\.running_var, "
            r"norm\.num_batches_tracked\. .*model\.eval\(\).*track_running_stats=False.*"
            r"module_buffers='ignore'.*in the log$"
        )
        with pytest.raises(LogError, match=message):
            optimizer.step(closure)
        assert len(calls) == 2
        assert log.steps == 2
        assert model.norm.num_batches_tracked == (1 if which == "last" else 2)
        after = values(model.parameters())
        model.eval()
        with pytest.raises(LogError, match=r"an earlier step have written norm\.running_mean"):
            optimizer.step(closure)
        assert len(calls) == 2
        assert same(values(model.parameters()), after)
    assert read(path).steps == 2
    assert same(replayed(path, built()), after)


@both
def test_buffers_that_are_saved_elsewhere_can_be_ignored(tmp_path, which):
    model, path = built(), tmp_path / "log"
    optimizer = make(model)
    optimizer.module_buffers = which
    with pytest.raises(ValueError, match="Invalid module_buffers: 'every'"):
        StepLog.create(path, optimizer, module_buffers="every")
    with StepLog.create(path, optimizer, module_buffers="ignore"):
        for step in range(3):
            optimizer.step(loss_of(model, step))
    assert same(replayed(path, built()), values(model.parameters()))
    assert model.norm.num_batches_tracked == (3 if which == "last" else 6)
    # A log that an earlier version wrote is like this one.
    other = built()
    going_on = make(other)
    with StepLog.resume(path, going_on, module_buffers="ignore") as log:
        assert same(values(other.parameters()), values(model.parameters()))
        going_on.step(loss_of(other))
        assert log.steps == 4


def test_of_an_unknown_model_nothing_is_seen(tmp_path):
    model = built()
    optimizer = AdaMeZO(model.named_parameters(), **OPTIONS)
    with StepLog.create(tmp_path / "log", optimizer) as log:
        optimizer.step(loss_of(model))
        optimizer.model = model  # from here on it is
        with pytest.raises(LogError, match=r"this step have written norm\.running_mean"):
            optimizer.step(loss_of(model))
        assert log.steps == 2


@perturbations
def test_a_step_that_failed_has_its_own_error_and_the_next_is_refused(tmp_path, perturbation):
    model = built()
    model.eval()
    optimizer = make(model, perturbation=perturbation)

    def closure():
        model.train()
        loss_of(model)()
        model.eval()
        raise LookupError

    with StepLog.create(tmp_path / "log", optimizer) as log:
        with pytest.raises(LookupError):
            optimizer.step(closure)
        with pytest.raises(LogError, match=r"an earlier step have written norm\.running_mean"):
            optimizer.step(loss_of(model))
        assert log.steps == 0


def test_odd_buffers_are_named(tmp_path):
    model = built(Odd)
    optimizer = make(model)
    with StepLog.create(tmp_path / "log", optimizer) as log:
        with pytest.raises(LogError, match="have written left, right, count and 7 more"):
            optimizer.step(loss_of(model))
        changed = "left right count average moved absent removed sparse thin made"
        assert sorted(log._watch.written) == sorted(changed.split())


@both
@perturbations
def test_constants_and_weights_among_the_buffers_are_no_reason(tmp_path, perturbation, which):
    """As `inv_freq` is; and a parameter that is a buffer too, which steps in place write."""
    model = nn.Sequential(nn.Linear(7, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.register_buffer("inv_freq", torch.rand(8), persistent=False)
    model.register_buffer("parameter", model[0].weight)
    model.register_buffer("alias", model[0].bias.detach()[1:])
    optimizer = make(model, perturbation=perturbation)
    optimizer.module_buffers = which
    with StepLog.create(tmp_path / "log", optimizer) as log:
        for step in range(3):
            optimizer.step(loss_of(model, step))
        model.inv_freq.add_(1)  # not by an evaluation
        optimizer.step(loss_of(model))
        assert log.steps == 4
        with pytest.raises(LogError, match=r"have written inv_freq\. "):
            optimizer.step(lambda: loss_of(model)() + model.inv_freq.mul_(2).sum())
