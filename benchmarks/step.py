"""What does a step cost, and how much of it is the optimizer?

    python -m benchmarks.step            about 15 minutes on two cores
    python -m benchmarks.step --quick    three minutes: fewer variants and repeats

The main job: SmolLM2-135M in float32 with 16 sequences of 32 and of 128 tokens. Two bare forwards;
MeZO and AdaMeZO as ours, as pure torch at its best and as the released codes have them; a method
that stores a Hessian; AdamW by backpropagation. A step is split at the moments when its closure
begins and ends. Peak memory is measured in a process of its own for each variant. Writes
benchmarks/results/step_cpu.csv and draws its plot from it.

What is measured and how is told apart from where: a `Job` is a model, a batch and a device, a
`Method` an optimizer. `benchmarks.paper` and `benchmarks.horizon` measure other ones with this.
"""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from adamezo import AdaMeZO
from adamezo.finetune.measure import PeakMemory
from adamezo_kernels.backends import BACKENDS
from benchmarks.gate import gate
from benchmarks.library_calls import AsReleased, Fair, LibraryOptimizer, StoredHessian
from benchmarks.rows import RESULTS, Row, conditions, timing, write_rows

PARTS = ("forwards", "perturbation", "update")
SEED = 2026
# So small that hundreds of steps leave the weights what they are; time does not depend on it.
LR = 1e-12

Closure = Callable[[], Tensor]
Step = Callable[[Closure], object]


# Jobs --------------------------------------------------------------------------------------------


def main_model(dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M-Instruct; where its weights are not installed, random ones in its shapes, which
    cost the same."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from adamezo.integrations.transformers import load
    from examples.demo import smollm2

    try:
        path = smollm2()
    except SystemExit as missing:  # its message says what to install
        print(missing, "Random weights in the same shapes are measured.", file=sys.stderr)
    else:
        return load(path, dtype=dtype, device=torch.get_default_device())[0]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def opt(dtype: torch.dtype, *, hidden: int, layers: int, heads: int, vocabulary: int) -> nn.Module:
    """Random weights in the shapes of an OPT model."""
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "SmolLM2-135M": main_model,
    "OPT-1.3B": functools.partial(opt, hidden=2048, layers=24, heads=32, vocabulary=50272),
    # For tests, and to run all of a benchmark where there is no GPU.
    "OPT-tiny": functools.partial(opt, hidden=32, layers=2, heads=4, vocabulary=128),
}


@dataclass(frozen=True)
class Job:
    """All of a step but its method. `benchmark` is the column of its rows."""

    benchmark: str
    model: str
    type: str
    length: int
    batch: int = 16
    device: str = "cpu"

    @property
    def tokens(self) -> str:
        return f"{self.batch}x{self.length}"

    def load(self) -> nn.Module:
        torch.manual_seed(SEED)
        with torch.device(self.device):
            return MODELS[self.model](getattr(torch, self.type)).eval()

    def closure(self, model: Any) -> Closure:
        """The main job's forward: cross entropy of the label word after the prompt, on one batch.
        The vocabulary's logits at the last position alone."""
        generator = torch.Generator().manual_seed(SEED)
        size = model.config.vocab_size
        tokens = torch.randint(size // 40, size, (self.batch, self.length), generator=generator)
        labels = torch.randint(0, 2, (self.batch,), generator=generator)
        words = torch.tensor([4255, 1799]) % size
        tokens, labels, words = (t.to(self.device) for t in (tokens, labels, words))

        def closure() -> Tensor:
            logits = model(input_ids=tokens, logits_to_keep=1, use_cache=False).logits
            return nn.functional.cross_entropy(logits[:, -1, words].float(), labels)

        return closure

    def columns(self) -> dict[str, Any]:
        """The columns of its rows."""
        return dict(
            benchmark=self.benchmark,
            type=self.type,
            tokens=self.tokens,
            threads=torch.get_num_threads() if self.device == "cpu" else 1,
        )


# Methods -----------------------------------------------------------------------------------------

FORWARDS = {"bare": 2, "MeZO": 2, "AdaMeZO": 2, "HiZOO": 3, "AdamW": 1}

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, fast directions": {"distribution": "fast"},
    "ours, Triton": {},
    "ours, exact perturbation": {"perturbation": "exact"},
}


@dataclass(frozen=True)
class Method:
    """A variant of a row and the optimizer behind it, with its history full."""

    variant: str
    method: str
    horizon: int = 0

    @property
    def betas(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.method == "MeZO" else (0.7, 0.9)

    def __str__(self) -> str:
        if self.method == "bare":
            return "two bare forwards"
        return f"{self.method}{f' H={self.horizon}' if self.horizon > 1 else ''}, {self.variant}"

    def backend(self, device: str) -> str:
        """The name of the backend that one of OURS runs on."""
        if self.variant == "ours, Triton":
            return "triton"
        return {"cpu": "native", "cuda": "cuda"}[device]

    def missing(self, device: str) -> str:
        """Why it cannot run on this device; empty where it can."""
        if self.variant not in OURS:
            return ""
        name = self.backend(device)
        backend = BACKENDS.get(name)
        if backend is None:
            return f"there is no backend {name!r}"
        available, reason = backend.availability()
        if not available:
            return f"backend {name!r} is not available: {reason}"
        options = OURS[self.variant]
        if not backend.supports(torch.device(device)):
            return f"backend {name!r} does not run on {device}"
        if options.get("distribution", "exact") not in backend.DISTRIBUTIONS:
            return f"backend {name!r} has no {options['distribution']!r} directions"
        unknown = set(options) - set(inspect.signature(AdaMeZO).parameters)
        return f"AdaMeZO takes no {', '.join(sorted(unknown))}" if unknown else ""

    def make(self, model: nn.Module, device: str = "cpu") -> Step:
        """The `step` of a new optimizer; its time is that of any step after the first `horizon`."""
        if self.method == "bare":
            return two_forwards
        if self.method == "AdamW":
            # Its default eps is 0 in float16, and some gradients are 0.
            adamw = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6)
            return functools.partial(backpropagation, adamw)
        if self.method == "HiZOO":
            return StoredHessian(model.parameters(), lr=LR).step
        # Two alternating values, as losses of +-1e-3 about a level would give.
        grads = [0.5 * (-1) ** age for age in range(self.horizon)]
        if self.variant not in OURS:
            operations = (Fair if self.variant == "torch" else AsReleased)(model.parameters())
            library = LibraryOptimizer(operations, lr=LR, betas=self.betas, horizon=self.horizon)
            library.history = [(SEED + age, grad) for age, grad in enumerate(grads)]
            return library.step
        options = dict(OURS[self.variant], lr=LR, betas=self.betas, horizon=self.horizon, seed=SEED)
        if "perturbation" in options:
            options["model"] = model
        backend = {"ADAMEZO_BACKEND": self.backend(device)}  # refused, where it is not there
        with mock.patch.dict(os.environ, backend):
            optimizer = AdaMeZO(model.parameters(), **options)
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group.update(
                directions=list(range(self.horizon))[::-1],
                projected_grads=grads,
                steps=self.horizon,
                next_direction=self.horizon,
            )
        optimizer.load_state_dict(state)

        def step(closure: Closure) -> object:
            with mock.patch.dict(os.environ, backend):
                return optimizer.step(closure)

        return step


@torch.no_grad()
def two_forwards(closure: Closure) -> object:
    return closure() + closure()


def backpropagation(optimizer: torch.optim.Optimizer, closure: Closure) -> object:
    """A forward, then a backward pass and the update: the split counts both of these as one."""
    loss = closure()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


# Time --------------------------------------------------------------------------------------------


class Marks:
    """Moments on the device's own clock. On a GPU they are events on the stream: nothing waits at
    them, so the step that is split is the step that is timed."""

    def __init__(self, device: str) -> None:
        self._events: list[Any] = []
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.synchronize()  # a step begins when the one before it has ended
        self.add()

    def add(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._events.append(time.perf_counter())

    def gaps(self) -> list[float]:
        """Seconds from each moment to the next."""
        pairs = itertools.pairwise(self._events)
        if not self._cuda:
            return [end - begin for begin, end in pairs]
        self._events[-1].synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


@dataclass
class Split:
    """Seconds of a step's parts, by the moments at which its closure begins and ends."""

    method: Method
    step: Step | None
    closure: Closure
    device: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})

    def once(self) -> None:
        if self.step is None:
            return
        marks = Marks(self.device)

        def timed() -> Tensor:
            marks.add()
            loss = self.closure()
            marks.add()
            return loss

        try:
            loss = self.step(timed)
        except torch.OutOfMemoryError:
            print(f"{self.method}: does not fit into memory", flush=True)
            self.step = None
            self.forget()
        if self.step is None:  # now that the error holds on to nothing
            gc.collect()
            torch.cuda.empty_cache()
            return
        marks.add()
        gaps = marks.gaps()
        expected = FORWARDS[self.method.method]
        if len(gaps) != 2 * expected + 1:
            raise RuntimeError(
                f"{self.method}: a step evaluated its closure {len(gaps) // 2} times, expected "
                f"{expected}"
            )
        if not math.isfinite(float(loss)):  # type: ignore[arg-type]
            raise RuntimeError(f"{self.method}: the loss is {loss}, so its step was not a step")
        self.seconds["perturbation"].append(sum(gaps[:-1:2]))
        self.seconds["forwards"].append(sum(gaps[1::2]))
        self.seconds["update"].append(gaps[-1])

    def forget(self) -> None:
        self.seconds = {part: [] for part in PARTS}

    @property
    def total(self) -> list[float]:
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


def runnable(methods: Iterable[Method], device: str) -> list[Method]:
    """Those that can run here; of the others it prints why not."""
    able = []
    for method in methods:
        reason = method.missing(device)
        if reason:
            print(f"left out: {method}, because {reason}", flush=True)
        else:
            able.append(method)
    return able


def measure(job: Job, methods: Mapping[Method, int], where: dict[str, object]) -> list[Row]:
    """Rows for the whole step and each part; `methods` gives each method's number of repeats. The
    last row is the size of the model's largest module.

    A method that did not fit into memory has rows without a time.
    """
    model = job.load()
    closure = job.closure(model)
    able = runnable(methods, job.device)
    splits = [Split(m, m.make(model, job.device), closure, job.device) for m in able]
    weights = [(p, p.data, p.detach().clone()) for p in model.parameters()]
    with torch.no_grad():
        closure()
    start = time.perf_counter()
    rounds = max(methods.values())
    for done in range(rounds):
        for split in splits:
            if done >= methods[split.method]:
                continue
            # The first step of each is its warm-up, except where one costs many seconds: the
            # methods take turns, so the model and the allocator are warm by then.
            if done == 0 and (job.device == "cuda" or split.method.variant in (*OURS, "forward")):
                split.once()
                split.forget()
            split.once()
            # The released codes' way moves weights to new addresses, at which ours would have to
            # look anew; and no method shall step from where another one's rounding has led.
            for parameter, data, values in weights:
                parameter.data = data.copy_(values)
                parameter.grad = None
        if done == 0:
            left = sum(
                sum(split.total) * (methods[split.method] - 1) for split in splits if split.step
            )
            print(
                f"{job.tokens} {job.type}: {len(splits)} variants; the first round took "
                f"{time.perf_counter() - start:.0f} s, all others should take {left:.0f} s",
                flush=True,
            )
    elements = sum(p.numel() for p in model.parameters())
    made = []
    for split in splits:
        method = split.method
        base = [
            s.total
            for s in splits
            if s.method == Method("torch", method.method, method.horizon) and s.total
        ]
        reference = statistics.median(base[0]) if base and split.total else None
        for part, seconds in (("step", split.total), *split.seconds.items()):
            whole = part == "step"
            columns: dict[str, Any] = timing(seconds) if seconds else {}
            made.append(
                Row(
                    what=f"{method.method} {part}",
                    variant=method.variant,
                    elements=elements,
                    horizon=method.horizon,
                    reference="torch" if whole and reference else "",
                    ratio=reference / columns["median_s"] if whole and reference else None,
                    **columns,
                    **job.columns(),
                    **where,  # type: ignore[arg-type]
                )
            )
        if split.total:
            print(
                f"{job.tokens} {job.type} {method}: "
                + ", ".join(f"{p} {statistics.median(s):.3g} s" for p, s in split.seconds.items())
                + ("" if method == ADAMW else f"; optimizer {share(made[-4:]):.1%} of the step"),
                flush=True,
            )
    made.append(
        Row(
            what="largest module",
            variant="weights",
            peak_bytes=largest_module(model),
            **job.columns(),
            **where,  # type: ignore[arg-type]
        )
    )
    return made


def largest_module(model: nn.Module) -> int:
    """Bytes of the trainable weights of the module that has the most of its own."""
    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(False) if p.requires_grad)
        for module in model.modules()
    )


def share(rows: list[Row]) -> float:
    """The optimizer's share of a step, from the rows of one variant."""
    part = {row.what.split()[-1]: row.median_s or 0.0 for row in rows}
    optimizer = part["perturbation"] + part["update"]
    return optimizer / (optimizer + part["forwards"])


# Memory ------------------------------------------------------------------------------------------

TOO_MUCH = "out of memory"


def peak_here(job: Job, method: Method) -> int | str | None:
    """The peak of this process over two steps; None where it cannot be measured."""
    model = job.load()
    closure = job.closure(model)
    step = method.make(model, job.device)
    # The first forward makes what stays (thread pools, packed buffers): it is in every variant.
    with torch.no_grad():
        closure()
    gc.collect()
    peak = PeakMemory(torch.device(job.device))
    peak.reset()
    try:
        for _ in range(2):
            step(closure)
    except torch.OutOfMemoryError:
        return TOO_MUCH
    return peak.read()


def measure_peaks(job: Job, methods: Iterable[Method], where: dict[str, object]) -> list[Row]:
    """Peak memory of each method over that of a bare forward, each in a new process."""
    made: list[Row] = []
    for method in [BARE, *runnable(methods, job.device)]:
        wanted = json.dumps({"job": asdict(job), "method": asdict(method)})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step", "--peak", wanted],
            # Of memory in use: glibc would keep up to hundreds of MiB of what was freed, or not.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"peak of {wanted} failed: {done.stderr.strip()[-2000:]}")
        peak = json.loads(done.stdout.splitlines()[-1])
        if peak is None:
            print("peak memory: not measured, this system does not let a process reset its peak")
            return []
        fits = peak != TOO_MUCH
        bare = made[0].peak_bytes if made else peak
        made.append(
            Row(
                what=f"{method.method} peak",
                variant=method.variant,
                horizon=method.horizon,
                repeats=2 if fits else 0,
                reference="forward",
                ratio=peak / bare if fits else None,
                peak_bytes=peak if fits else None,
                **job.columns(),
                **where,  # type: ignore[arg-type]
            )
        )
        name = method if made[1:] else "bare forward"
        text = f"peak {peak / 2**20:.0f} MiB, {peak / bare:.3f} of a bare forward's" if fits else ""
        print(f"{job.tokens} {job.type} {name}: {text or TOO_MUCH}", flush=True)
    return made


# The main job ------------------------------------------------------------------------------------

BARE = Method("forward", "bare")
MEZO, ADAMEZO, ADAMEZO_20 = (
    Method("ours", "MeZO", 1),
    Method("ours", "AdaMeZO", 10),
    Method("ours", "AdaMeZO", 20),
)
EXACT = Method("ours, exact perturbation", "AdaMeZO", 10)
RELEASED = {m: Method("as released", m.method, m.horizon) for m in (MEZO, ADAMEZO, ADAMEZO_20)}
TORCH = {m: Method("torch", m.method, m.horizon) for m in (MEZO, ADAMEZO, ADAMEZO_20)}
HIZOO = Method("library calls", "HiZOO", 1)
ADAMW = Method("backpropagation", "AdamW", 1)

SHORT, LONG = (Job("step", "SmolLM2-135M", "float32", length) for length in (32, 128))


def plan(job: Job, quick: bool) -> dict[Method, int]:
    """How often each method steps: fewer times where a step takes many seconds."""
    ours = (3 if quick else 7) if job == SHORT else (2 if quick else 4)
    counts = dict.fromkeys([BARE, MEZO, ADAMEZO, EXACT], ours)
    if quick:
        return counts | ({RELEASED[MEZO]: 1, RELEASED[ADAMEZO]: 1} if job == SHORT else {})
    counts[ADAMEZO_20] = 5 if job == SHORT else 3
    slow = [RELEASED[MEZO], RELEASED[ADAMEZO], TORCH[MEZO], TORCH[ADAMEZO], ADAMW]
    return counts | (dict.fromkeys([*slow, HIZOO], 3) if job == SHORT else dict.fromkeys(slow, 2))


def peaks(job: Job, quick: bool) -> list[Method]:
    """Whose peak memory is measured."""
    if quick:
        return [ADAMEZO, EXACT] if job == SHORT else []
    few = [ADAMEZO, RELEASED[MEZO], RELEASED[ADAMEZO]]
    return [MEZO, EXACT, *few, HIZOO, ADAMW] if job == SHORT else few[:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three minutes, for a first look")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_cpu.csv")
    parser.add_argument("--no-plots", action="store_true", help="write the CSV alone")
    parser.add_argument("--peak", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        wanted = json.loads(arguments.peak)
        print(json.dumps(peak_here(Job(**wanted["job"]), Method(**wanted["method"]))))
        return

    start = time.perf_counter()
    gate([torch.float32], backend="native")
    made = run((SHORT, LONG), plan, peaks, conditions(), arguments.output, arguments.quick)
    print(f"{len(made)} rows in {time.perf_counter() - start:.0f} s: {arguments.output.name}")
    if not arguments.no_plots:
        from benchmarks.plots import plot_paper, plot_step

        plot_step(arguments.output)
        plot_paper(arguments.output.parent)


def run(
    jobs: Iterable[Job],
    plan: Callable[[Job, bool], Mapping[Method, int]],
    peaks: Callable[[Job, bool], list[Method]],
    where: dict[str, object],
    output: Path,
    quick: bool,
) -> list[Row]:
    """Times all jobs, then measures their memory, and writes what there is after each."""
    jobs = list(jobs)
    made: list[Row] = []
    for job in jobs:
        made += measure(job, plan(job, quick), where)
        write_rows(output, made)
        gc.collect()  # the model, before the next one is loaded
    for job in jobs:
        if methods := peaks(job, quick):
            start = time.perf_counter()
            made += measure_peaks(job, methods, where)
            seconds = time.perf_counter() - start
            print(f"{job.tokens}: {len(methods) + 1} processes took {seconds:.0f} s", flush=True)
            write_rows(output, made)
    return made


if __name__ == "__main__":
    main()
