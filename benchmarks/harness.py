"""The one way to time, and the gate before it: no speed without the reference's bits."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import RULES, ops
from adamezo_kernels.plan import Plan
from adamezo_kernels.stream import PhiloxState
from adamezo_kernels.terms import Terms
from benchmarks.library_calls import coefficients


class Marks:
    """Moments on a device's own clock. On a GPU they are events on the stream: nothing waits at
    them, so what is split into parts is what is timed."""

    def __init__(self, device: str) -> None:
        self._events: list[Any] = []
        self._cuda = device == "cuda"
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
        pairs = pairwise(self._events)
        if not self._cuda:
            return [end - begin for begin, end in pairs]
        self._events[-1].synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


@dataclass
class Variant:
    """Something to time: `run`, under `threads` threads and inside `context()`."""

    name: str
    run: Callable[[], object]
    threads: int = 1
    isa: str = ""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    device: str = "cpu"
    seconds: list[float] = field(default_factory=list)

    def once(self, calls: int = 1) -> float:
        """Seconds a call, over `calls` calls in a row."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with self.context():
                marks = Marks(self.device)
                for _ in range(calls):
                    self.run()
                marks.add()
                return marks.gaps()[0] / calls
        finally:
            torch.set_num_threads(before)


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a replay of a CUDA graph, captured when it is first called: what a replay takes
    is the kernels' time, where a call in Python takes 31 to 53 us whatever the kernels do."""
    graphs: list[Any] = []

    def replay() -> None:
        if not graphs:
            call()  # makes what a capture may not: tables on the device, compiled kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graphs.append(graph)
        graphs[0].replay()

    return replay


def interleave(variants: Sequence[Variant], *, repeats: int = 7, sample_s: float = 1e-3) -> None:
    """Times the variants in turn (A B A B ...) into `Variant.seconds`, after one warm-up of each.

    In turn, because a machine's speed drifts over minutes, and what is compared must see the same
    drift. Calls shorter than `sample_s` are timed several at once, as the clock costs about 0.1 us.
    """
    calls = []
    for variant in variants:
        seconds = variant.once()
        if seconds < sample_s or variant.device == "cuda":  # the first call may pay for a start-up
            seconds = variant.once()
        calls.append(max(1, math.ceil(sample_s / max(seconds, 1e-7))))
    for _ in range(repeats):
        for variant, n in zip(variants, calls, strict=True):
            variant.seconds.append(variant.once(n))


# Odd sizes, so that vector bodies and tails both run; several tensors, so several parameters.
SIZES = (4099, 1, 37)
HORIZON = 10
# Numbers of a step of each rule that many calls leave as they are, from buffers of ones.
RULE_NUMBERS = {
    "adam": (0.9, 0.1, 0.999, 0.001, 1.0, 1.0),
    "hizoo": (-1e-9, 1e-9, 1.0),
    "helene": (0.9, 0.1, 0.99, 0.01, 1.0, 0.3),
    "adamu": (0.8, 0.6, 0.9, 0.1, 0.9, 0.1, 1.0),
}


class GateError(RuntimeError):
    """A backend's bits differ from the reference's, so its speed means nothing."""


def rule_terms(rule: str, lr: float) -> Terms:
    """A step of a rule with buffers."""
    states = [PhiloxState(2026, k) for k in range(RULES[rule].directions)]
    return Terms.of(states, minus_lr=-lr, rule=rule, numbers=RULE_NUMBERS[rule])


def moment_terms(lr: float, beta2: float) -> Terms:
    """A step of AdaMeZO; with a beta2 of 0 its v is 1."""
    states = [PhiloxState(2026, HORIZON - age) for age in range(HORIZON)]
    sums = coefficients([5.0 * (-1) ** age for age in range(HORIZON)], (0.7, beta2))
    return Terms.of(states, *sums, minus_lr=-lr, decay=0.999)


def gate(
    types: Iterable[torch.dtype], *, backend: str, device: str = "cpu", label: str = ""
) -> None:
    """Raises GateError unless `backend` gives on `device` the bits that the reference gives on the
    CPU, in every operation that is timed."""
    for dtype in types:
        expected = _results(dtype, "reference", "cpu")
        for name, got in _results(dtype, backend, device).items():
            pairs = zip(got, expected[name], strict=True)
            wrong = sum(int((_bits(a.cpu()) != _bits(b)).sum()) for a, b in pairs)
            if wrong:
                raise GateError(
                    f"{name} of backend {label or backend} on {device} in {dtype}: {wrong} of "
                    f"{sum(SIZES)} elements differ from the reference's bits, expected none. No "
                    "speed is measured: run the tests of the kernels first"
                )


def _results(dtype: torch.dtype, backend: str, device: str) -> dict[str, list[Tensor]]:
    """What each operation gives, from the same weights."""
    generator = torch.Generator().manual_seed(0)
    start = [(0.02 * torch.randn(n, generator=generator)).to(device, dtype) for n in SIZES]
    found: dict[str, list[Tensor]] = {"sample_": [torch.empty_like(w) for w in start]}
    for index, out in enumerate(found["sample_"]):
        ops.sample_(out, PhiloxState(2026, 40), parameter=index, backend=backend)
    roundings = ("nearest",) if dtype == torch.float32 else ("nearest", "stochastic")
    # A learning rate at which the update moves 16-bit weights by many units in the last place.
    steps = {rule: rule_terms(rule, 1e-2) for rule in RULE_NUMBERS}
    steps |= {"AdaMeZO": moment_terms(1e-2, 0.9), "v = 1": moment_terms(1e-2, 0.0)}
    for rounding, (name, terms) in itertools.product(roundings, steps.items()):
        options: dict[str, Any] = dict(rounding=rounding, backend=backend)
        weights = [w.clone() for w in start]
        buffers = RULES[terms.rule].buffers
        kept = [[torch.ones_like(w) for _ in range(buffers)] for w in weights]
        plan = Plan(weights).with_buffers(kept) if buffers else Plan(weights)
        ops.perturb_(plan, terms, 1e-3, **options)
        found[f"perturb_ ({name}), {rounding}"] = [w.clone() for w in weights]
        ops.update_terms_(plan, terms, restore=-1e-3, **options)
        found[f"update_terms_ ({name}), {rounding}"] = [*weights, *(b for k in kept for b in k)]
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
