"""What does a step of the main job cost, and how much of it is the optimizer?

    python -m benchmarks.step            about 5 minutes on two cores
    python -m benchmarks.step --quick    about a minute: no library calls but one, fewer repeats

MeZO and AdaMeZO on SmolLM2-135M in float32 with 16 sequences of 32 and of 128 tokens: ours, pure
torch, and as the released codes have it. A step is split at the moments when its closure begins
and ends. Peak memory is measured in a process of its own for each variant. Writes
benchmarks/results/step_cpu.csv and draws its plot from it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from adamezo import AdaMeZO
from adamezo.measure import PeakMemory
from benchmarks.gate import gate
from benchmarks.library_calls import AsReleased, Fair, LibraryOptimizer
from benchmarks.rows import RESULTS, Row, conditions, timing, write_rows

BATCH = 16
LENGTHS = (32, 128)
PARTS = ("forwards", "perturbation", "update")
SEED = 2026
# So small that hundreds of steps leave the weights what they are; time does not depend on it.
LR = 1e-12


def load_model() -> tuple[nn.Module, str]:
    """SmolLM2-135M-Instruct in float32, and what it is called in the output.

    Where its weights are not installed, random ones in the same shapes, which cost the same.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from adamezo.integrations.transformers import load
    from examples.demo import smollm2

    try:
        path = smollm2()
    except SystemExit as missing:  # its message says what to install
        print(missing)
    else:
        return load(path)[0], "SmolLM2-135M-Instruct"
    torch.manual_seed(SEED)
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
    return LlamaForCausalLM(config).float().eval(), "SmolLM2-135M shapes, random weights"


def make_closure(model: nn.Module, length: int) -> Callable[[], Tensor]:
    """The main job's forward: cross entropy of the label word after the prompt, on one batch."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(1000, 40000, (BATCH, length), generator=generator)
    labels = torch.randint(0, 2, (BATCH,), generator=generator)
    words = torch.tensor([4255, 1799])

    @torch.no_grad()
    def closure() -> Tensor:
        logits = model(input_ids=tokens, logits_to_keep=1, use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, -1, words].float(), labels)

    return closure


@dataclass(frozen=True)
class Method:
    """A variant of a row and the optimizer behind it, with its history full."""

    variant: str
    method: str
    horizon: int

    @property
    def betas(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.method == "MeZO" else (0.7, 0.9)

    def make(self, model: nn.Module) -> Callable[[Callable[[], Tensor]], object]:
        """The `step` of a new optimizer; its time is that of any step after the first `horizon`."""
        # Two alternating values, as losses of +-1e-3 about a level would give.
        grads = [0.5 * (-1) ** age for age in range(self.horizon)]
        if self.variant == "ours":
            optimizer = AdaMeZO(
                model.parameters(), lr=LR, betas=self.betas, horizon=self.horizon, seed=SEED
            )
            state = optimizer.state_dict()
            for group in state["param_groups"]:
                group.update(
                    directions=list(range(self.horizon))[::-1],
                    projected_grads=grads,
                    steps=self.horizon,
                    next_direction=self.horizon,
                )
            optimizer.load_state_dict(state)
            return optimizer.step
        operations = (Fair if self.variant == "torch" else AsReleased)(model.parameters())
        library = LibraryOptimizer(operations, lr=LR, betas=self.betas, horizon=self.horizon)
        library.history = [(SEED + age, grad) for age, grad in enumerate(grads)]
        return library.step


@dataclass
class Split:
    """Seconds of a step's parts, by the moments at which its closure begins and ends."""

    method: Method
    step: Callable[[Callable[[], Tensor]], object]
    closure: Callable[[], Tensor]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})

    def once(self) -> None:
        marks = [time.perf_counter()]

        def timed() -> Tensor:
            marks.append(time.perf_counter())
            loss = self.closure()
            marks.append(time.perf_counter())
            return loss

        self.step(timed)
        marks.append(time.perf_counter())
        if len(marks) != 6:
            raise RuntimeError(f"a step evaluated its closure {len(marks) // 2 - 1} times, not 2")
        start, begin1, end1, begin2, end2, end = marks
        self.seconds["perturbation"].append((begin1 - start) + (begin2 - end1))
        self.seconds["forwards"].append((end1 - begin1) + (end2 - begin2))
        self.seconds["update"].append(end - end2)

    @property
    def total(self) -> list[float]:
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


def measure(
    model: nn.Module, length: int, methods: dict[Method, int], where: dict[str, object]
) -> list[Row]:
    """Rows for the whole step and each part; `methods` gives each method's number of repeats."""
    closure = make_closure(model, length)
    splits = [Split(method, method.make(model), closure) for method in methods]
    closure()
    for done in range(max(methods.values())):
        for split in splits:
            if done < methods[split.method]:
                # The first step of each is its warm-up, except where one costs many seconds: the
                # methods take turns, so the model and the allocator are warm by then.
                if done == 0 and split.method.variant == "ours":
                    split.once()
                    split.seconds = {part: [] for part in PARTS}
                split.once()
    elements = sum(p.numel() for p in model.parameters())
    made = []
    for split in splits:
        method = split.method
        base = [
            s.total
            for s in splits
            if s.method.variant == "torch"
            and (s.method.method, s.method.horizon) == (method.method, method.horizon)
        ]
        reference = statistics.median(base[0]) if base else None
        for part, seconds in (("step", split.total), *split.seconds.items()):
            columns = timing(seconds)
            whole = part == "step"
            made.append(
                Row(
                    benchmark="step",
                    what=f"{method.method} {part}",
                    variant=method.variant,
                    type="float32",
                    elements=elements,
                    horizon=method.horizon,
                    threads=torch.get_num_threads(),
                    tokens=f"{BATCH}x{length}",
                    reference="torch" if whole and reference else "",
                    ratio=reference / columns["median_s"] if whole and reference else None,
                    **columns,  # type: ignore[arg-type]
                    **where,  # type: ignore[arg-type]
                )
            )
        print(
            f"{BATCH}x{length} {method.method} H={method.horizon} {method.variant}: "
            + ", ".join(f"{p} {statistics.median(s):.2f} s" for p, s in split.seconds.items())
            + f"; optimizer {share(made[-4:]):.1%} of the step",
            flush=True,
        )
    return made


def share(rows: list[Row]) -> float:
    """The optimizer's share of a step, from the rows of one variant."""
    part = {row.what.split()[-1]: row.median_s or 0.0 for row in rows}
    optimizer = part["perturbation"] + part["update"]
    return optimizer / (optimizer + part["forwards"])


# Memory ------------------------------------------------------------------------------------------


def peak_here(variant: str, method: str, horizon: int, length: int) -> int | None:
    """The peak of this process over two steps, or of as many forwards for variant "forward"."""
    model, _ = load_model()
    closure = make_closure(model, length)
    run: Callable[[], object]
    if variant == "forward":
        run = closure
    else:
        step = Method(variant, method, horizon).make(model)
        run = functools.partial(step, closure)
    # The first forward makes what stays (thread pools, packed buffers): it is in every variant.
    closure()
    gc.collect()
    peak = PeakMemory(torch.device("cpu"))
    peak.reset()
    for _ in range(2):
        run()
    return peak.read()


def measure_peaks(length: int, methods: list[Method], where: dict[str, object]) -> list[Row]:
    """Peak memory of each method over that of a bare forward, each in a new process."""
    made: list[Row] = []
    for method in [Method("forward", "bare", 0), *methods]:
        arguments = [method.variant, method.method, str(method.horizon), str(length)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step", "--peak", *arguments],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"peak of {arguments} failed: {done.stderr.strip()[-2000:]}")
        peak = json.loads(done.stdout.splitlines()[-1])
        if peak is None:
            print("peak memory: not measured, this system does not let a process reset its peak")
            return []
        bare = made[0].peak_bytes if made else peak
        made.append(
            Row(
                benchmark="step",
                what=f"{method.method} peak",
                variant=method.variant,
                type="float32",
                horizon=method.horizon,
                threads=torch.get_num_threads(),
                tokens=f"{BATCH}x{length}",
                repeats=2,
                reference="forward",
                ratio=peak / bare,
                peak_bytes=peak,
                **where,  # type: ignore[arg-type]
            )
        )
        print(
            f"{BATCH}x{length} {method.method} H={method.horizon} {method.variant}: "
            f"peak {peak / 2**20:.0f} MiB, {peak / bare:.3f} of a bare forward's",
            flush=True,
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute, for a first look")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_cpu.csv")
    parser.add_argument("--no-plots", action="store_true", help="write the CSV alone")
    parser.add_argument("--peak", nargs=4, metavar=("VARIANT", "METHOD", "HORIZON", "LENGTH"))
    arguments = parser.parse_args()
    if arguments.peak:
        variant, method, horizon, length = arguments.peak
        print(json.dumps(peak_here(variant, method, int(horizon), int(length))))
        return

    start = time.perf_counter()
    gate([torch.float32], backend="native")
    where = conditions()
    model, weights = load_model()
    count = sum(p.numel() for p in model.parameters())
    print(f"{weights}: {count / 1e6:.1f}M weights, {torch.get_num_threads()} threads", flush=True)

    mezo, ada, ada20 = (
        Method("ours", "MeZO", 1),
        Method("ours", "AdaMeZO", 10),
        Method("ours", "AdaMeZO", 20),
    )
    fair = {m: Method("torch", m.method, m.horizon) for m in (mezo, ada, ada20)}
    released = Method("as released", "AdaMeZO", 10)
    made: list[Row] = []
    if arguments.quick:
        made += measure(model, 32, {mezo: 3, ada: 3, fair[ada]: 1}, where)
        made += measure(model, 128, {mezo: 2, ada: 2}, where)
    else:
        made += measure(
            model,
            32,
            {mezo: 7, ada: 7, ada20: 5, fair[mezo]: 3, fair[ada]: 3, fair[ada20]: 2, released: 2},
            where,
        )
        write_rows(arguments.output, made)
        made += measure(model, 128, {mezo: 5, ada: 5, ada20: 3, fair[mezo]: 3, fair[ada]: 3}, where)
    write_rows(arguments.output, made)
    del model
    gc.collect()
    made += measure_peaks(32, [ada] if arguments.quick else [mezo, ada, fair[ada], released], where)
    if not arguments.quick:
        made += measure_peaks(128, [ada], where)
    write_rows(arguments.output, made)
    print(f"{len(made)} rows in {time.perf_counter() - start:.0f} s: {arguments.output.name}")
    if not arguments.no_plots:
        from benchmarks.plots import plot_step

        plot_step(arguments.output)


if __name__ == "__main__":
    main()
