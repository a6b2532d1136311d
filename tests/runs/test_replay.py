"""The log of a run: its weights again to the bit, and what is refused."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import warnings
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import stress as attacks
from adamezo import AdaMeZO, cli, finetune, methods
from adamezo.integrations import transformers as language_models
from adamezo.runlog import (
    LogError,
    StepLog,
    digest,
    optimizer_for,
    parse,
    read,
    replay,
    replay_file,
)
from helpers.jobs import options
from stress import loss_of, make_optimizer, same_bits, small, values

OPTIONS = {"lr": 1e-2, "zo_eps": 1e-2, "horizon": 4, "seed": 5, "max_skipped": 99}


def fails():
    raise LookupError("no data")


def two_groups(model: nn.Module, **changed) -> AdaMeZO:
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "lr": 3e-3, "betas": (0.5, 0.8)}]
    return AdaMeZO(groups, model=model, **{**OPTIONS, **changed})


def run(model: nn.Module, optimizer: AdaMeZO, steps: int = 5) -> None:
    """Steps of every outcome, under a schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    losses = iter((1.0, None))  # the second evaluation fails
    for _ in range(steps):
        optimizer.step(loss_of(model))
        schedule.step()
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step(lambda: math.nan)
    with pytest.raises(LookupError):
        optimizer.step(fails)
    with pytest.raises(TypeError):
        optimizer.step(lambda: next(losses))
    for _ in range(steps):
        optimizer.step(loss_of(model))
        schedule.step()


def replayed(path, model: nn.Module, until=None) -> list[torch.Tensor]:
    """The log's weights, on those of ``model``."""
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = read(path)
    replay(log, optimizer_for(log.header, base), until=until)
    return list(base.values())


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rounding": "nearest", "weight_decay": 0.1},
        {"perturbation": "out_of_place"},
        {"distribution": "rademacher"},
        {"normalization": "bias_corrected", "maximize": True, "warmup_lr": 1e-3},
        {"betas": (0.0, 0.0)},
        {"fused": False},
    ],
    ids=str,
)
def test_a_replay_has_the_bits_of_the_run(tmp_path, changed):
    model = small()
    optimizer = two_groups(model, **changed)
    with StepLog.create(tmp_path / "log", optimizer) as log:
        run(model, optimizer)
        assert log.steps == 11
    assert not same_bits(values(model), values(small()))
    assert same_bits(replayed(tmp_path / "log", small()), values(model))
    # And the optimizer is where it was, so that the run can go on.
    again = small()
    other = two_groups(again, **changed)
    with StepLog.resume(tmp_path / "log", other):
        assert other.state_dict()["param_groups"][0]["lr"] != OPTIONS["lr"]
        for group, reached in zip(other.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = reached["lr"]  # the schedule's last word came after the last record
        assert attacks.history(other) == attacks.history(optimizer)
        for m, o in ((model, optimizer), (again, other)):
            o.step(loss_of(m))
    assert same_bits(values(again), values(model))


OWN = {  # what a method needs, or what makes the number of its directions change
    "AdaZeta": {"steps_per_epoch": 2, "exponent": 1.5, "alpha": 1.0},
    "MeZO": {"queries": 3, "linear_over": 6},
}


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_replays(tmp_path, name):
    model = small()
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "lr": 3e-3}]
    optimizer = getattr(methods, name)(groups, lr=1e-2, seed=5, **OWN.get(name, {}))
    with StepLog.create(tmp_path / "log", optimizer):
        run(model, optimizer)
    assert not same_bits(values(model), values(small()))
    assert same_bits(replayed(tmp_path / "log", small()), values(model))


def test_a_run_on_one_backend_replays_on_the_other(tmp_path, monkeypatch):
    model = small()
    optimizer = two_groups(model)
    with StepLog.create(tmp_path / "log", optimizer):
        run(model, optimizer)
    monkeypatch.setenv("ADAMEZO_BACKEND", "reference")
    assert same_bits(replayed(tmp_path / "log", small()), values(model))


def test_every_step_can_be_had(tmp_path):
    model = small()
    optimizer = make_optimizer(model, exact=False)
    seen = [values(model)]
    with StepLog.create(tmp_path / "log", optimizer):
        for _ in range(4):
            optimizer.step(loss_of(model))
            seen.append(values(model))
    for step, expected in enumerate(seen):
        assert same_bits(replayed(tmp_path / "log", small(), until=step), expected)
    for until in (-1, 5):
        with pytest.raises(LogError, match=f"has 4 steps, there is no step {until}"):
            replayed(tmp_path / "log", small(), until=until)


def test_a_log_may_begin_in_the_middle_of_a_run(tmp_path):
    model = small()
    optimizer = make_optimizer(model, exact=False)
    for _ in range(3):
        optimizer.step(loss_of(model))
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    with StepLog.create(tmp_path / "log", optimizer):
        for _ in range(3):
            optimizer.step(loss_of(model))
    log = read(tmp_path / "log")
    replay(log, optimizer_for(log.header, base))
    assert same_bits(list(base.values()), values(model))


def test_frozen_and_tied_weights(tmp_path):
    def make():
        model = small()
        model.norm.requires_grad_(False)
        model.again = nn.Linear(33, 5)
        model.again.weight = nn.Parameter(model.out.weight.detach())  # the same memory
        return model

    torch.manual_seed(0)
    model = make()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, exact=False)
    with StepLog.create(tmp_path / "log", optimizer):
        for _ in range(3):
            optimizer.step(loss_of(model))
    log = read(tmp_path / "log")
    names = [entry.name for entry in log.header.manifest]
    assert "norm.weight" not in names
    assert "again.weight" not in names
    del start["norm.weight"], start["again.weight"]
    replay(log, optimizer_for(log.header, start))
    for name, tensor in start.items():
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_the_digest_is_of_the_bytes():
    import hashlib

    tensors = [torch.arange(700_000.0), torch.ones(3, 4).bfloat16().t(), torch.empty(0)]
    data = b"".join(t.contiguous().view(torch.int8).numpy().tobytes() for t in tensors[:2])
    assert digest(tensors) == hashlib.sha256(data).hexdigest()


# --- the file -------------------------------------------------------------------------------------


def test_a_log_is_small(tmp_path):
    model = small()
    optimizer = make_optimizer(model, exact=False)
    with StepLog.create(tmp_path / "log", optimizer):
        size = (tmp_path / "log").stat().st_size
        optimizer.step(loss_of(model))
    record = (tmp_path / "log").stat().st_size - size
    assert record == 27
    assert size + 20_000 * record < 10**6
    assert os.listdir(tmp_path) == ["log"]


def test_a_log_cut_at_any_byte_is_its_beginning(tmp_path):
    """What a process killed at any moment leaves, and a machine that lost its power."""
    data = attacks.small_log(tmp_path)
    whole = parse(data)
    size = whole.header.record.size
    head = len(data) - size * len(whole.records)
    for cut in range(len(data)):
        if cut < head:
            with pytest.raises(LogError, match="cut off|not a log"):
                parse(data[:cut])
            continue
        for rest in (b"", bytes(7), bytes(100)):
            log = parse(data[:cut] + rest)
            if (cut - head) % size == 0 or not rest:
                assert len(log.records) == (cut - head) // size
                assert log.torn == (cut - head) % size + len(rest)
                break


def test_every_bit_is_checked(tmp_path):
    data = attacks.small_log(tmp_path)
    records = parse(data).records
    size = parse(data).header.record.size
    head = len(data) - size * len(records)
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        where = "the header|not a log|format" if at < head else f"record {(at - head) // size + 1} "
        with pytest.raises(LogError, match=where):
            parse(bytes(bad))


def test_records_cannot_be_moved_left_out_or_taken_from_another_log(tmp_path):
    data = attacks.small_log(tmp_path)
    size = parse(data).header.record.size
    head = len(data) - size * len(parse(data).records)
    body = [data[i : i + size] for i in range(head, len(data), size)]
    for a, b in itertools.combinations(range(len(body)), 2):
        moved = list(body)
        moved[a], moved[b] = moved[b], moved[a]
        with pytest.raises(LogError, match=f"record {a + 1} is damaged"):
            parse(data[:head] + b"".join(moved))
    for left_out in range(len(body) - 1):
        with pytest.raises(LogError, match=f"record {left_out + 1} is damaged"):
            parse(data[:head] + b"".join(body[:left_out] + body[left_out + 1 :]))


def test_damaged_logs_in_numbers():
    assert attacks.fuzz_logs(4000, seed=1)["refused"] > 3000
    seen = attacks.fuzz_headers(300, seed=1)
    assert min(seen["refused"], seen["replayed"]) > 5


def test_the_fuzzer_sees_a_reader_that_checks_nothing(monkeypatch):
    monkeypatch.setattr(zlib, "crc32", lambda *arguments: 0)
    with pytest.raises(SystemExit, match="wrong log"):
        attacks.fuzz_logs(2000)


def test_a_later_format_is_refused(tmp_path):
    data = attacks.small_log(tmp_path)
    with pytest.raises(LogError, match="format 2, this version of adamezo reads 1"):
        parse(data[:8] + b"\2\0\0\0" + data[12:])
    with pytest.raises(LogError, match="not a log: it begins with b'PK"):
        parse(b"PK" + data)
    (tmp_path / "other").write_bytes(b"text")
    with pytest.raises(LogError, match="other: not a log"):
        read(tmp_path / "other")


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path):
    model = small()
    optimizer = make_optimizer(model, exact=False)
    log = StepLog.create(tmp_path / "log", optimizer, run={"data": "a"})
    optimizer.step(loss_of(model))
    yield model, optimizer, log, tmp_path / "log"
    log.close()


def test_another_base_is_refused(logged):
    path = logged[3]
    other = small()
    with torch.no_grad():
        other.norm.bias[3] += 1e-6
    with pytest.raises(LogError, match="the weights are not those that it began with"):
        replayed(path, other)
    changed = small()
    changed.out = nn.Linear(33, 6)
    with pytest.raises(
        LogError, match=r"out\.bias \(parameter 6, float32, \[5\]\) is here .*\[6\]"
    ):
        replayed(path, changed)
    with pytest.raises(LogError, match="bfloat16"):
        replayed(path, small().bfloat16())
    renamed = nn.ModuleDict({"model": small()})
    with pytest.raises(LogError, match=r"the base has no tensor 'embed\.weight'"):
        replayed(path, renamed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 8}, r"group 0 had seed 7, here it is 8.*options of the log \(seed=7\)"),
        ({"betas": (0.5, 0.9)}, r"betas \[0\.7, 0\.9\], here it is \[0\.5, 0\.9\]"),
        ({"rounding": "nearest"}, "rounding 'stochastic'"),
        ({"distribution": "rademacher"}, "distribution"),
    ],
)
def test_a_run_with_other_options_is_not_resumed(logged, changed, message):
    _, _, log, path = logged
    log.close()
    model = small()
    optimizer = AdaMeZO(model.named_parameters(), **{**attacks.OPTIONS, **changed})
    before, data = values(model), path.read_bytes()
    with pytest.raises(LogError, match=message):
        StepLog.resume(path, optimizer, run={"data": "a"})
    assert same_bits(before, values(model))
    assert path.read_bytes() == data
    assert optimizer.recorder is None


def test_another_run_is_not_resumed(logged):
    logged[2].close()
    with pytest.raises(LogError, match="data was 'a', here it is 'b'"):
        StepLog.resume(logged[3], make_optimizer(small(), exact=False), run={"data": "b"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, o: o.param_groups[0].update(betas=(0.5, 0.9)), r"betas of group 0 from \[0\.7"),
        (lambda m, o: o.param_groups[0].update(weight_decay=0.1), "weight_decay of group 0"),
        (
            lambda m, o: o.add_param_group({"params": [("x", nn.Parameter(torch.ones(2)))]}),
            "x|group",
        ),
        (lambda m, o: m.norm.weight.add_(1), r"norm\.weight was written, replaced"),
        (lambda m, o: m.load_state_dict(m.state_dict()), r"embed\.weight, norm\.weight"),
        (lambda m, o: setattr(m.norm.weight, "data", torch.ones(12)), r"norm\.weight was written"),
        (lambda m, o: m.norm.weight.requires_grad_(False), r"norm\.weight was written.*frozen"),
    ],
)
def test_what_the_log_cannot_tell_is_refused_before_the_step(logged, change, message):
    model, optimizer, log, path = logged
    with torch.no_grad():
        change(model, optimizer)
    before, data = values(model), path.read_bytes()
    with pytest.raises(LogError, match=message):
        optimizer.step(fails)
    assert same_bits(before, values(model))
    assert path.read_bytes() == data
    assert optimizer.step() is None  # frameworks do that


def test_options_that_do_not_decide_the_weights_may_change(logged):
    model, optimizer, log, path = logged
    optimizer.param_groups[0].update(lr=0.5, fused=False, max_skipped=3, nonfinite="raise")
    optimizer.step(loss_of(model))
    log.close()
    assert same_bits(replayed(path, small()), values(model))


def test_two_writers_are_one_too_many(logged):
    _, optimizer, _, path = logged
    with pytest.raises(LogError, match="has a recorder already"):
        StepLog.create(path.with_name("other"), optimizer)
    other = make_optimizer(small(), exact=False)
    with pytest.raises(LogError, match="open for writing, in this process or another: close it"):
        StepLog.resume(path, other)
    with pytest.raises(FileExistsError, match="resume it, or name another file"):
        StepLog.create(path, other)
    assert other.recorder is None


def test_a_full_disk(logged, monkeypatch):
    """The step is done, and no later one leaves a hole in the log."""
    model, optimizer, log, path = logged
    real, room = os.write, [10]

    def write(file, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "no space left on the device")
        written = real(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    before = path.read_bytes()
    for _ in range(2):  # some bytes go in, then none
        with pytest.raises(LogError, match="the step is done, but its record cannot be written"):
            optimizer.step(loss_of(model))
        assert path.read_bytes() == before
        after = values(model)
        with pytest.raises(LogError, match="The next step tries again"):
            optimizer.step(fails)
        assert same_bits(values(model), after)
        break
    room[0] = 10**6
    optimizer.step(loss_of(model))
    log.close()
    assert read(path).steps == 3
    assert same_bits(replayed(path, small()), values(model))


def test_a_step_that_broke_ends_a_log(logged, monkeypatch):
    model, optimizer, log, path = logged
    before = values(model)

    def closure():
        with torch.no_grad():
            model.norm.weight.add_(1)
        return 1.0

    with pytest.raises(RuntimeError, match=r"has written to norm\.weight"):
        optimizer.step(closure)
    with pytest.raises(LogError, match="the last step failed half-way"):
        optimizer.step(fails)
    log.close()
    with pytest.raises(LogError, match="record 2 is of a step that failed half-way.* at step 1"):
        replayed(path, small())
    assert same_bits(replayed(path, small(), until=1), before)
    # Whoever resumes has the weights before it, and goes on.
    again = small()
    other = make_optimizer(again, exact=False)
    with StepLog.resume(path, other, run={"data": "a"}):
        assert same_bits(values(again), before)
        other.step(loss_of(again))
    assert same_bits(replayed(path, small()), values(again))


def test_a_torn_tail_is_cut_off(logged):
    model, optimizer, log, path = logged
    log.close()
    data = path.read_bytes()
    for tail in (b"\1\2\3", bytes(50)):
        path.write_bytes(data + tail)
        with StepLog.resume(path, make_optimizer(small(), False), run={"data": "a"}) as resumed:
            assert resumed.steps == 1
            assert path.read_bytes() == data
    path.write_bytes(data + b"\1" * 30)
    with pytest.raises(LogError, match="record 2 is damaged"):
        StepLog.resume(path, make_optimizer(small(), False), run={"data": "a"})


def test_a_capturable_optimizer_is_refused(tmp_path):
    optimizer = make_optimizer(small(), exact=False)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(LogError, match="capturable"):
        StepLog.create(tmp_path / "log", optimizer)


def test_records_that_cannot_be_are_refused_by_the_optimizer():
    model = small()
    optimizer = make_optimizer(model, exact=False)
    records = []
    optimizer.recorder = records.append
    optimizer.step(loss_of(model))
    again = small()
    other = make_optimizer(again, exact=False)
    before = values(again)
    for changed, message in (
        ({"outcome": "broken"}, "outcome is 'broken'"),
        ({"direction": 1}, "direction is 1, the next one is 0"),
        ({"perturbations": 3}, "3 perturbations, a step has 2 at most"),
        ({"lrs": (0.1, 0.1)}, "2 learning rates for 1 groups"),
        ({"lrs": (math.nan,)}, "learning rates are"),
        ({"measured": ()}, "0 measured values, expected 1"),
        ({"measured": (math.inf,)}, "measured values are"),
    ):
        with pytest.raises(ValueError, match=message):
            other.replay(records[0]._replace(**changed))
    assert same_bits(before, values(again))
    other.replay(records[0])
    assert same_bits(values(again), values(model))


# --- files and the command line -------------------------------------------------------------------


def test_weights_in_files(logged, tmp_path):
    model, _, log, path = logged
    log.close()
    base = small().state_dict()
    torch.save({**base, "a buffer": torch.ones(2)}, tmp_path / "base.pt")
    save_file(base, tmp_path / "base.safetensors")
    for name in ("base.pt", "base.safetensors"):
        for out in ("out.pt", "out.safetensors"):
            assert replay_file(tmp_path / name, path, tmp_path / out) == 1
            load = torch.load if out.endswith(".pt") else load_file
            found = load(tmp_path / out)
            for key, tensor in model.state_dict().items():
                assert torch.equal(found[key], tensor)
            assert ("a buffer" in found) == (name == "base.pt")
    with pytest.raises(LogError, match="expected a name ending in .safetensors, .pt"):
        replay_file(tmp_path / "base.pt", path, tmp_path / "folder")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(LogError, match="expected a state_dict"):
        replay_file(tmp_path / "list.pt", path, tmp_path / "out.pt")


def test_the_replay_command(model_folder, data_file, tmp_path, capsys):
    log, trained = tmp_path / "log", tmp_path / "trained"
    finetune.finetune(options(model_folder, data_file, log=str(log), save_to=str(trained)))
    arguments = ["replay", str(model_folder), str(log), "--out"]
    assert cli.main([*arguments, str(tmp_path / "again")]) == 0
    printed = capsys.readouterr()
    assert "the weights after 4 steps" in printed.out
    assert "4/4" in printed.err
    expected = load_file(trained / "model.safetensors")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert same_bits(list(expected.values()), list(found.values()))
    assert language_models.load(tmp_path / "again")  # with its tokenizer
    assert cli.main([*arguments, str(tmp_path / "again.safetensors"), "--until", "2"]) == 0
    middle = load_file(tmp_path / "again.safetensors")
    assert middle.keys() == expected.keys()
    assert not same_bits(list(middle.values()), list(expected.values()))
    assert cli.main([*arguments, str(tmp_path / "no"), "--until", "9"]) == 1
    assert "has 4 steps, there is no step 9" in capsys.readouterr().err
    assert cli.main(["replay", str(trained), str(log), "--out", str(tmp_path / "no")]) == 1
    assert "the weights are not those that it began with" in capsys.readouterr().err


# --- fine-tuning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_job_that_stopped_goes_on(model_folder, data_file, tmp_path, monkeypatch, dtype):
    """Stopped by an error in the third step; the ends are the same bits, and so are the logs."""
    job = {"lr_schedule": "linear", "eval_every": 2, "dtype": dtype, "steps": 6}
    whole = finetune.finetune(
        options(
            model_folder, data_file, log=str(tmp_path / "a"), save_to=str(tmp_path / "A"), **job
        )
    )
    calls = itertools.count(1)
    real = finetune.Classification.losses

    def losses(self, rows, batch):
        # Two for its memory, two to check the loss, then the first of the third step.
        if next(calls) == 2 + 2 + 5:
            raise MemoryError("no room")
        return real(self, rows, batch)

    settings = options(
        model_folder, data_file, log=str(tmp_path / "b"), save_to=str(tmp_path / "B"), **job
    )
    monkeypatch.setattr(finetune.Classification, "losses", losses)
    with pytest.raises(MemoryError):
        finetune.finetune(settings)
    monkeypatch.undo()
    resumed = finetune.finetune(settings)
    assert resumed["training"]["replayed"] == 2
    assert [point["step"] for point in resumed["curve"]] == [3, 4, 5, 6]
    logs = [read(tmp_path / name) for name in "ab"]
    assert [record.outcome for record in logs[1].records].count("failed") == 1
    # In place, a step that was undone leaves its roundings. They are in the log, and replayed.
    again = tmp_path / "again"
    replay_file(model_folder, tmp_path / "b", again)
    found = [load_file(f / "model.safetensors") for f in (again, tmp_path / "B")]
    assert same_bits(list(found[0].values()), list(found[1].values()))
    assert resumed["after"]["loss"] == pytest.approx(whole["after"]["loss"], rel=0.05)
    # Once more: there is nothing left to do.
    done = finetune.finetune(settings)
    assert done["curve"] == []
    assert done["after"] == resumed["after"]


def test_a_job_with_a_log_is_the_job_without(model_folder, data_file, tmp_path):
    plain = finetune.finetune(options(model_folder, data_file))
    logged_ = finetune.finetune(options(model_folder, data_file, log=str(tmp_path / "log")))
    evaluated = finetune.finetune(options(model_folder, data_file, eval_every=1))
    assert plain["curve"] == logged_["curve"] == evaluated["curve"]
    assert plain["after"] == logged_["after"] == evaluated["after"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 3}, "batch_size was 4, here it is 3"),
        ({"template": "{text} It  was {label}"}, "template was"),
        ({"held_out": 11}, "held_out was 10"),
        ({"lr": 2e-3}, "lr was 0.001, here it is 0.002"),
        ({"seed": 4}, "seed was 0|had seed 0"),
    ],
)
def test_another_job_does_not_go_on(model_folder, data_file, tmp_path, changed, message):
    log = str(tmp_path / "log")
    finetune.finetune(options(model_folder, data_file, log=log, steps=2))
    with pytest.raises(LogError, match=message):
        finetune.finetune(options(model_folder, data_file, log=log, steps=2, **changed))


def test_a_job_may_be_made_longer(model_folder, data_file, tmp_path):
    log = str(tmp_path / "log")
    finetune.finetune(options(model_folder, data_file, log=log, steps=2))
    longer = finetune.finetune(options(model_folder, data_file, log=log, steps=5))
    assert [point["step"] for point in longer["curve"]] == [3, 4, 5]
    whole = finetune.finetune(options(model_folder, data_file, steps=5))
    assert longer["after"] == whole["after"]
    with pytest.raises(ValueError, match="has 5 steps, expected 3 at most"):
        finetune.finetune(options(model_folder, data_file, log=log, steps=3))


def test_a_record_of_everything_in_the_header_is_json(tmp_path):
    data = attacks.small_log(tmp_path)
    length = int.from_bytes(data[12:16], "little")
    header = json.loads(data[16 : 16 + length])
    assert header["groups"][0]["seed"] == attacks.OPTIONS["seed"]
    assert header["groups"][0]["stream_version"] == 1
    assert header["manifest"][0] == ["weight", [2, 3], "float32", 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse(data).steps == 7
