"""SIGKILL of `adamezo finetune --log`; and what a replay and a log cost."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from adamezo import AdaMeZO
from adamezo.engine.records import StepRecord
from adamezo.runlog import StepLog, optimizer_for, read, replay

from .small import OPTIONS, ROOT, expect, same_bits

RUN = "import sys; from adamezo.cli import main; sys.exit(main())"


def command(model: Path, log: Path, save_to: Path, steps: int) -> list[str]:
    data = ROOT / "examples" / "data" / "movie_reviews.csv"
    return [
        *(sys.executable, "-c", RUN, "finetune", "--model", str(model), "--data", str(data)),
        *("--template", "{text} It was {label}"),
        *("--label-words", "negative=terrible", "positive=great"),
        *("--held-out", "4", "--steps", str(steps), "--batch-size", "2", "--lr", "1e-4"),
        *("--lr-schedule", "linear", "--device", "cpu", "--log", str(log)),
        *("--save-to", str(save_to), "--output", str(save_to.parent / "report")),
    ]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def kills(count: int, model: Path, folder: Path, steps: int, seed: int = 0) -> Counter[str]:
    """Starts `adamezo finetune --log`, kills it at a random moment, starts it again, and so on, and
    lets it finish. The weights and the log have to be those of a run that nobody killed, and the
    log alone has to give the weights."""
    chosen = random.Random(seed)
    whole, log = folder / "whole.log", folder / "killed.log"

    def start(log: Path, save_to: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command(model, log, save_to, steps),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(process: subprocess.Popen[bytes]) -> None:
        _, said = process.communicate()
        expect(process.returncode == 0, f"the run failed: {said.decode()[-2000:]}")

    finish(start(whole, folder / "whole"))
    record = read(whole).header.record.size
    head = whole.stat().st_size - record * steps

    def compare() -> None:
        expect(log.read_bytes() == whole.read_bytes(), "the killed run has another log")
        files = [(folder / name / "model.safetensors") for name in ("whole", "killed")]
        expect(files[0].read_bytes() == files[1].read_bytes(), "the killed run has other weights")

    seen: Counter[str] = Counter()
    per_kill = max(1, (steps - 1) // (count + 1))
    while seen.total() < count:
        had = log.stat().st_size if log.exists() else 0
        wanted = max(had, head) + record * chosen.randrange(per_kill + 1)
        process = start(log, folder / "killed")
        began = time.perf_counter()
        while not (log.exists() and log.stat().st_size >= wanted and time.perf_counter() > began):
            if process.poll() is not None:
                break
            time.sleep(0.001)
        # The moment within what is going on: reading, replaying, or one of the next two steps.
        time.sleep(chosen.uniform(0, 0.3) if wanted > had else chosen.uniform(0, 12))
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == 0:  # it was at its end before it could be hit: another run
            compare()
            log.unlink()
            continue
        expect(process.returncode == -signal.SIGKILL, f"the run failed: {said.decode()[-2000:]}")
        grown = (log.stat().st_size if log.exists() else 0) > max(had, head)
        seen["while training" if grown else "before its first step"] += 1
    finish(start(log, folder / "killed"))
    compare()
    done = subprocess.run(
        [sys.executable, "-c", RUN, "replay", str(model), str(log), "--out", str(folder / "out")],
        env=environment(),
        capture_output=True,
    )
    expect(done.returncode == 0, done.stderr.decode()[-2000:])
    weights = (folder / "whole" / "model.safetensors").read_bytes()
    expect((folder / "out" / "model.safetensors").read_bytes() == weights, "another replay")
    return seen


def cut_smollm2(folder: Path, layers: int = 2) -> Path:
    """SmolLM2-135M's first layers as a folder: real weights and words, and quick."""
    from adamezo.integrations import transformers as language_models
    from examples import demo

    model, tokenizer = language_models.load(demo.smollm2())
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    language_models.save(model, tokenizer, folder)
    return folder


class Count(NamedTuple):
    """A number that an attack ends with."""

    what: str
    count: float
    unit: str = ""
    over_training: float | None = None


def replay_speed(steps: int = 6) -> list[Count]:
    """SmolLM2-135M in float32, 16 x 32 tokens: seconds of a step of training and of its replay."""
    from adamezo.integrations import transformers as language_models
    from examples import demo

    found = []
    for perturbation in ("inplace", "exact"):
        model, _ = language_models.load(demo.smollm2())
        tokens = torch.arange(16 * 32).view(16, 32) * 37 % 40000
        optimizer = AdaMeZO.for_model(model, seed=1, perturbation=perturbation)
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            with StepLog.create(path, optimizer), _no_collection():
                loss = lambda: model(tokens, labels=tokens, use_cache=False).loss  # noqa: E731, B023
                optimizer.step(loss)
                start = time.perf_counter()
                for _ in range(steps):
                    optimizer.step(loss)
                train = (time.perf_counter() - start) / steps
            log = read(path)
        again = optimizer_for(log.header, base)
        times = []

        def timed(
            records: Sequence[StepRecord], times: list[float] = times
        ) -> Iterator[StepRecord]:
            for record in records:
                times.append(time.perf_counter())
                yield record
            times.append(time.perf_counter())

        replay(log, again, progress=timed)
        expect(
            same_bits(list(base.values()), [p.detach() for p in model.parameters()]),
            "the replay has other bits",
        )
        replayed = (times[-1] - times[1]) / steps
        found += [
            Count(f"training, {perturbation}", 1 / train, "steps/s"),
            Count(f"replay, {perturbation}", 1 / replayed, "steps/s", train / replayed),
        ]
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def log_size() -> list[Count]:
    """Bytes of 20,000 steps, written."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdaMeZO([parameter], **OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with StepLog.create(path, optimizer):
            for step in range(20000):
                optimizer.step(lambda step=step: math.sin(step) + parameter[0])
        size = path.stat().st_size
        expect(read(path).steps == 20000, "steps are missing")
        record = read(path).header.record.size
    return [Count("a record", record, "bytes"), Count("a log of 20,000 steps", size, "bytes")]
