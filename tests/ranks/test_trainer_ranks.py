"""ZOTrainer on several processes (Gloo): the Trainer's own parts of the data, one run of all."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch import distributed

import adamezo
from adamezo import HELENE, AdaMeZO, MeZO, ZOAdam
from adamezo.distributed import RankFailed
from adamezo.integrations.accelerate import unwrapped
from adamezo.runlog import StepLog, optimizer_for, read, replay

transformers = pytest.importorskip("transformers")

from adamezo.integrations import ZOTrainer  # noqa: E402
from helpers import families, trainer_job  # noqa: E402
from helpers.trainers import rows, same, trainer, weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# Until 5.17 a Trainer of several processes loads tensors of an optimizer's state to "cpu:0", which
# torch refuses; AdaMeZO's has none.
BUFFERED = ZOAdam if Version(transformers.__version__) >= Version("5.18") else AdaMeZO
SAVED = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1,
         "lr_scheduler_type": "cosine"}  # fmt: skip


@contextmanager
def launched() -> Iterator[int]:
    """What torchrun tells a process of the group that there is."""
    from accelerate.state import AcceleratorState, GradientState

    rank, world = str(distributed.get_rank()), str(distributed.get_world_size())
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    os.environ.update(told)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield int(rank)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name in told:
            del os.environ[name]


def train(folder, model="llama", resume=False, seed=0, **changed):
    """Trains; returns what the tests look at, in a form that goes from process to process."""
    made = trainer(folder, families.make(model, seed), **changed)
    made.train(resume_from_checkpoint=resume)
    optimizer = unwrapped(made.optimizer)
    return {
        "weights": weights(made.model),
        "losses": optimizer.losses,
        "groups": [{k: v for k, v in group.items() if k != "params"}
                   for group in optimizer.state_dict()["param_groups"]],
        "history": made.state.log_history,
        "skipped": optimizer.skipped,
        "wrapped": type(made.model_wrapped).__name__,
    }  # fmt: skip


def on_a_rank(folder, **changed):
    with launched():
        return train(folder, **changed)


def logged(result, *names):
    return [[entry.get(name) for name in names] for entry in result["history"]]


NUMBERS = ("loss", "projected_grad", "learning_rate", "forward_passes", "skipped_steps", "step")


@pytest.mark.parametrize(
    ("model", "method", "accumulation"),
    [
        ("llama", (AdaMeZO, {}), 1),
        ("llama", (ZOAdam, {}), 2),
        ("llama", (HELENE, {"curvature": "sampled", "curvature_every": 3}), 2),
        ("roberta", (MeZO, {}), 1),
    ],
)
def test_ranks_have_the_weights_of_one_process_that_accumulates(
    pool, tmp_path, model, method, accumulation
):
    """It sees the same micro-batches. Their losses are summed exactly, and two ranks' are doubled
    and halved again: the same bits for any power of two of ranks. Roberta's are means of rows."""
    own = dict(model=model, optimizer_cls_and_kwargs=method, step_log=StepLog, logging_steps=1)
    if model == "roberta":
        own |= dict(data_collator=labelled)
    split = own | dict(gradient_accumulation_steps=accumulation)
    both = pool.run(2, ranks_run, tmp_path / "two", split)
    alone = train(tmp_path / "one", **own, gradient_accumulation_steps=2 * accumulation)
    for result in both:
        assert same(result["weights"], alone["weights"])
        assert result["losses"] == alone["losses"]
        assert result["groups"] == alone["groups"]
        assert logged(result, *NUMBERS) == logged(alone, *NUMBERS)
        assert "DistributedDataParallel" not in result["wrapped"]
    assert not same(alone["weights"], weights(families.make(model)))
    logs = [(tmp_path / name / "steps.log").read_bytes() for name in ("two", "one")]
    assert logs[0] == logs[1]


def ranks_run(folder, changed):
    return on_a_rank(folder, **changed)


def labelled(batch):
    """One label of each row, for a classification head."""
    ids = torch.tensor([row["input_ids"][:5] for row in batch])
    return {"input_ids": ids, "labels": ids[:, 3] % 2}


def test_ranks_share_a_batch_of_one_process(pool, tmp_path):
    """A batch of four in one process is two and two on two ranks, in other forwards. Where the
    samples' losses have the same bits in them, weights have; else the first losses are as close as
    float32 sums in other orders."""
    own = dict(gradient_accumulation_steps=1, max_steps=8, lr_scheduler_type="constant")
    split = own | dict(per_device_train_batch_size=2)
    whole = own | dict(per_device_train_batch_size=4)
    exact = pool.run(2, ranks_run, tmp_path / "a", split | {"kind": RowByRow})
    assert same(exact[0]["weights"], exact[1]["weights"])
    alone = train(tmp_path / "b", **whole, kind=RowByRow)
    assert same(exact[0]["weights"], alone["weights"])
    assert not same(alone["weights"], weights(families.make("llama")))
    first = [
        pool.run(2, ranks_run, tmp_path / "c", split | {"max_steps": 1})[0]["losses"],
        train(tmp_path / "d", **whole | {"max_steps": 1})["losses"],
    ]
    # Sums of 20 float32 terms of size 4 in another order: some units of 2^-24 of them.
    torch.testing.assert_close(*map(torch.tensor, first), rtol=2e-6, atol=0)


class RowByRow(ZOTrainer):
    """Whose samples' losses have the same bits in any batch, and are weighed alike."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = []
        names = ("input_ids", "labels", "attention_mask")
        for ids, labels, mask in zip(*(inputs[name] for name in names), strict=True):
            there = mask.bool()
            losses.append(model(ids[there][None], labels=labels[there][None]).loss)
        return adamezo.LossSum.of(torch.stack(losses))


@pytest.mark.parametrize("world", [2, 1])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(pool, tmp_path, world):
    """On two ranks again, with the dropout of each; or in one process, which has other dropout, and
    accumulates what two had."""
    own = dict(
        model="opt", step_log=StepLog, optimizer_cls_and_kwargs=(BUFFERED, {}),
        gradient_accumulation_steps=1, train_mode=world == 2, **SAVED,
    )  # fmt: skip
    whole = pool.run(2, ranks_run, tmp_path / "whole", own)
    pool.run(2, cut_run, tmp_path / "cut", own)
    assert read(tmp_path / "cut" / "steps.log").steps == 6
    if world == 2:
        resumed = pool.run(2, ranks_run, tmp_path / "cut", own | {"resume": True})
    else:
        own = own | {"gradient_accumulation_steps": 2, "resume": True}
        resumed = [train(tmp_path / "cut", **own)]
    for result in resumed:
        assert same(result["weights"], whole[0]["weights"])
        assert result["groups"] == whole[0]["groups"]
        assert logged(result, *NUMBERS) == logged(whole[0], *NUMBERS)
    logs = [(tmp_path / name / "steps.log").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    # The copy in a checkpoint makes the base weights those of the checkpoint, in one process.
    folder = tmp_path / "whole" / "checkpoint-8"
    log, base = read(folder / "steps.log"), families.make("opt")
    assert replay(log, optimizer_for(log.header, dict(base.named_parameters()))) == 8
    assert same(weights(base), weights(type(base).from_pretrained(folder)))


class Stop(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **objects):
        if state.global_step == 6:
            raise KeyboardInterrupt


def cut_run(folder, changed):
    with pytest.raises(KeyboardInterrupt):
        on_a_rank(folder, callbacks=[Stop()], **changed)


@pytest.mark.filterwarnings("ignore:the losses of a step were")
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(pool, tmp_path):
    own = dict(max_steps=4, logging_steps=1, lr_scheduler_type="constant", step_log=StepLog)
    both = pool.run(2, broken_run, tmp_path, own)
    assert same(both[0]["weights"], both[1]["weights"])
    assert [result["skipped"] for result in both] == [1, 1]
    assert [record.outcome for record in read(tmp_path / "steps.log").records] == [
        "updated", "updated", "skipped", "updated",
    ]  # fmt: skip


class NotFinite(ZOTrainer):
    """On rank 1 in the third step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        broken = self.state.global_step == 2 and self.args.process_index == 1
        return loss * float("nan") if broken else loss


def broken_run(folder, changed):
    return on_a_rank(folder, kind=NotFinite, **changed)


def test_all_begin_at_the_weights_of_the_first(pool, tmp_path):
    own = dict(max_steps=3, gradient_accumulation_steps=1)
    both = pool.run(2, unequal_run, tmp_path, own)
    assert same(both[0]["weights"], both[1]["weights"])
    assert same(both[0]["weights"], pool.run(2, ranks_run, tmp_path, own)[0]["weights"])


def unequal_run(folder, changed):
    """The seed of a model is the rank."""
    return on_a_rank(folder, seed=distributed.get_rank(), **changed)


def test_a_rank_that_raises_tells_the_others(pool, tmp_path):
    said = pool.run(2, raising_run, tmp_path)
    assert said[0] == ("RankFailed", "rank 1 raised RuntimeError: no more")
    assert said[1] == ("RuntimeError", "no more")


class Raises(ZOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.process_index == 1:
            raise RuntimeError("no more")
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def raising_run(folder):
    with pytest.raises((RuntimeError, RankFailed)) as raised:
        on_a_rank(folder, kind=Raises, max_steps=1)
    return type(raised.value).__name__, str(raised.value)


@pytest.mark.parametrize(
    ("config", "drop_last", "sizes"),
    [
        # 10 rows in batches of 2: the last round is filled up by the first rows of the epoch.
        ({}, False, [[2, 2, 2], [2, 2, 2]]),
        ({"split_batches": True}, False, [[1] * 5, [1] * 5]),
        ({"split_batches": True, "dispatch_batches": True}, False, [[1] * 5, [1] * 5]),
        ({"even_batches": False}, True, [[2, 2], [2, 2]]),
    ],
)
def test_ranks_have_equally_many_rows_of_every_step(pool, tmp_path, config, drop_last, sizes):
    both = pool.run(2, sizes_run, tmp_path, config, drop_last)
    assert [size for size, _ in both] == sizes
    assert same(both[0][1], both[1][1])


def sizes_run(folder, config, drop_last):
    seen = []
    model = families.make("llama")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with launched():
        made = trainer(
            folder, model, train_dataset=rows(10), gradient_accumulation_steps=1,
            max_steps=-1, num_train_epochs=1, accelerator_config=config,
            dataloader_drop_last=drop_last,
        )  # fmt: skip
        made.train()
    return seen[::2], weights(model)


def test_memory_that_runs_out_on_one_rank_makes_the_batch_smaller_on_all(pool, tmp_path):
    both = pool.run(2, full_run, tmp_path)
    assert both[0][0][-4:] == both[1][0][-4:] == [min(both[1][0])] * 4 < [3] * 4
    assert both[1][0][0] == 3
    assert same(both[0][1], both[1][1])


def full_run(folder):
    model, sizes = families.make("llama"), []

    def full(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2 and distributed.get_rank() == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    model.register_forward_pre_hook(full, with_kwargs=True)
    with launched():
        made = trainer(
            folder, model, per_device_train_batch_size=3, auto_find_batch_size=True, max_steps=2,
            gradient_accumulation_steps=1,
        )  # fmt: skip
        made.train()
    return sizes, weights(model)


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    # What it runs with several GPUs; with CPUs alone it needs mpirun.
    "accelerate launch": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--main_process_ip=127.0.0.1", "--mixed_precision=no", "--dynamo_backend=no"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_under(launcher, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], trainer_job.__file__, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = trainer(tmp_path / "one", step_log=StepLog, max_steps=6)  # which accumulates two
    alone.train()
    saved = load_file(tmp_path / "two" / "model.safetensors")
    for name, weight in alone.model.state_dict().items():
        assert torch.equal(weight, saved[name]), name
    logs = [(tmp_path / name / "steps.log").read_bytes() for name in ("two", "one")]
    assert logs[0] == logs[1]
