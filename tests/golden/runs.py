"""The runs whose bits are kept: a model, a loss without a machine in it, and what each run does.

A loss is a function of the weights alone. It is computed from Python's floats, one multiplication
or addition at a time, from the first element to the last: IEEE 754 has one result for each of
these, so that neither the machine nor the number of threads nor the version of torch has a say.
There is no other function in it (no exp, no sqrt), no matrix product, and no sum of torch's or of
Python's (`sum` of floats is another one from Python 3.12 on). Weights, targets and coefficients
come from integers by a division by a power of two, without a random number.

The formats are in README.md. make_golden.py and test_golden.py use this module.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import adamezo
from adamezo import runlog as step_log  # the log: named here alone
from adamezo_kernels import PhiloxState, Plan, Shard, perturb_, sample_
from adamezo_kernels.backends import triton

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs.json"
TRACES = HERE / "traces.json.gz"
DIRECTIONS = HERE / "directions.json"

SEED = 0xA4093822299F31D0
FIRST, EARLY, HALF, LATER, STEPS = STOPS = 2, 3, 25, 27, 50
"""After so many steps a digest is kept: FIRST and EARLY for Triton's interpreter and the reference,
which are slow, and LATER for the reference where it begins from what was saved after HALF."""


# --- the model ------------------------------------------------------------------------------------


def number(*integers: int) -> float:
    """In [-1, 1), a multiple of 2^-20, by integer arithmetic alone."""
    state = 0x9E3779B9
    for integer in integers:
        state = (state ^ integer) * 0x5851F42D4C957F2D + 0x14057B7EF767814F
        state = (state ^ (state >> 29)) % 2**64
    return ((state >> 33) % 2**21 - 2**20) / 2**20


class Piece(nn.Module):
    """Some weights, and their share of the loss."""

    def __init__(self, **weights: nn.Parameter) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def forward(self, step: int) -> float:
        total, before = 0.0, 0.0
        for number_of_weight, weight in enumerate(self._parameters.values()):
            for i, value in enumerate(weight.detach().reshape(-1).tolist()):
                # Operands are multiples of powers of two; only + - * from here on.
                x = value - ((29 * i + 17 * step + 5 * number_of_weight) % 64 - 32) / 64
                square = x * x
                total = total + square * ((1 + i % 5) / 256)
                total = total + x * before * (1 / 512)
                total = total + square * square * (1 / 2048)
                before = x
        return total


class Model(nn.Module):
    """Of three types, with weights of odd sizes, of none and of one, of no dimension, of gaps
    between rows, frozen, tied, and twice over the same memory."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()

        def weight(index: int, shape: Sequence[int], kind: torch.dtype) -> nn.Parameter:
            values = [number(index, i) for i in range(math.prod(shape))]
            made = torch.tensor(values, dtype=torch.float64).to(dtype or kind)
            return nn.Parameter(made.reshape(tuple(shape)))

        float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
        self.first = Piece(weight=weight(0, (7, 11), float32), bias=weight(1, (11,), float32))
        self.tied = Piece(weight=self.first.weight, bias=weight(2, (3,), float32))
        self.mixed = Piece(weight=weight(3, (5, 13), bfloat16), bias=weight(4, (17,), bfloat16))
        self.small = Piece(weight=weight(5, (2, 3, 5), float16), empty=weight(6, (0,), float16))
        rows = nn.Parameter(weight(7, (3, 12), float32).detach()[:, 2:9])
        self.rows = Piece(weight=rows, scalar=weight(8, (), float32))
        self.frozen = Piece(weight=weight(9, (9,), float32).requires_grad_(False))
        self.alias = Piece(weight=nn.Parameter(self.mixed.bias.detach()))

    def forward(self, step: int) -> float:
        total = 0.0
        for piece in self.children():
            total = total + piece(step)
        return total

    def weights(self) -> dict[str, Tensor]:
        """By their names; the alias is not another one."""
        return {n: p.detach() for n, p in self.named_parameters() if n != "alias.weight"}


# --- what the runs are ----------------------------------------------------------------------------


class Case(NamedTuple):
    method: str
    options: dict[str, Any]
    events: dict[int, str] = {}
    """What happens at a step: "skipped": a loss is NaN. "failed": the closure raises at its first
    evaluation, and "failed later" at its second; the step is then taken again."""
    groups: tuple[dict[str, Any], ...] = ()
    """Options of two groups, of the first few pieces and of the others."""
    dtype: str | None = None
    """Of all weights, instead of three types."""
    schedule: bool = False
    """Whether the learning rate changes from step to step."""
    sampled: bool = False
    """Whether a step is given a second closure."""


def _cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, options: dict[str, Any], **more: Any) -> tuple[str, Case]:
        method, _, what = name.partition(", ")
        options = {"zo_eps": 2.0**-6, **options} if what != "defaults" else options
        return name, Case(method, {"seed": SEED, **options}, **more)

    bad = {1: "skipped", 2: "failed later", 7: "failed", 17: "skipped", 18: "skipped"}
    bad |= {30: "skipped", 33: "failed later"}
    two = (
        {"weight_decay": 0.125, "lr": 0.004},
        {"maximize": True, "rounding": "nearest", "lr": 0.001},
    )
    out_of_place = {"perturbation": "exact"}

    a = {"lr": 0.01, "horizon": 4}
    yield case("AdaMeZO, defaults", {})
    yield case("AdaMeZO, paper", a)
    yield case("AdaMeZO, bias corrected", {**a, "normalization": "bias_corrected"})
    yield case("AdaMeZO, official", {**a, "normalization": "official", "lr": 1e-4})
    yield case("AdaMeZO, warmup", {**a, "warmup_lr": 0.03})
    yield case("AdaMeZO, no second beta", {**a, "betas": (0.7, 0.0), "lr": 0.02})
    yield case("AdaMeZO, no betas", {"betas": (0.0, 0.0), "lr": 0.02})
    yield case("AdaMeZO, no first beta", {**a, "betas": (0.0, 0.9)})
    yield case("AdaMeZO, weight decay", {**a, "weight_decay": 0.5})
    yield case("AdaMeZO, maximize", {**a, "maximize": True, "lr": 0.003})
    horizons = ({**two[0], "horizon": 7}, {**two[1], "betas": (0.5, 0.8), "eps": 1e-3})
    yield case("AdaMeZO, two groups", a, groups=horizons, schedule=True)
    yield case("AdaMeZO, signs", {**a, "distribution": "rademacher"})
    yield case("AdaMeZO, low rank", {**a, "distribution": "lowrank"})
    yield case("AdaMeZO, low rank 3, two groups", {**a, "distribution": "lowrank:3"}, groups=two)
    yield case("AdaMeZO, nearest", {**a, "rounding": "nearest"})
    yield case("AdaMeZO, out of place", {**a, **out_of_place})
    signs = {**a, **out_of_place, "distribution": "rademacher", "rounding": "nearest"}
    yield case("AdaMeZO, out of place, signs, nearest", signs)
    for dtype in ("float32", "bfloat16", "float16"):
        yield case(f"AdaMeZO, {dtype}", {**a, "seed": 2**64 - 1}, dtype=dtype)
    yield case("AdaMeZO, skipped and failed", a, events=bad, schedule=True)
    yield case("AdaMeZO, out of place, skipped and failed", {**a, **out_of_place}, events=bad)
    skips = {step: what for step, what in bad.items() if what == "skipped"}
    yield case("AdaMeZO, skipped", a, events=skips)
    yield case("AdaMeZO, capturable", {**a, "capturable": True})
    yield case("AdaMeZO, capturable, skipped", {**a, "capturable": True}, events=skips)
    corrected = {**a, "normalization": "bias_corrected", "capturable": True}
    yield case("AdaMeZO, capturable, bias corrected", corrected)

    yield case("ScalarAdaMeZO, defaults", {})
    yield case("ScalarAdaMeZO, paper", a)
    yield case("ScalarAdaMeZO, bias corrected", {**a, "normalization": "bias_corrected"})
    yield case("ScalarAdaMeZO, two groups, skipped", a, groups=two, events=skips)
    yield case("ScalarAdaMeZO, capturable", {**a, "capturable": True})

    z = {"lr": 0.02}
    yield case("MeZO, defaults", {})
    yield case("MeZO, one direction", z)
    yield case("MeZO, two directions", {**z, "queries": 2, "weight_decay": 0.125})
    yield case("MeZO, linear", {**z, "queries": 4, "linear_over": 40}, events=skips)
    yield case("MeZO, maximize, nearest", {"lr": 0.004, "maximize": True, "rounding": "nearest"})
    yield case("MeZO, signs", {**z, "queries": 3, "distribution": "rademacher"})
    yield case("MeZO, out of place", {**z, **out_of_place, "queries": 2})
    yield case("MeZO, skipped and failed", {**z, "queries": 2}, events=bad, groups=two)
    yield case("MeZO, capturable", {**z, "queries": 2, "capturable": True, "weight_decay": 0.125})

    yield case("MEAZO, defaults", {})
    yield case("MEAZO, plain", {"lr": 0.01})
    yield case("MEAZO, two groups", {"beta": 0.75}, groups=two, events=bad)
    yield case("MEAZO, capturable", {"lr": 0.01, "capturable": True})

    yield case("FZOO, defaults", {})
    f = {"lr": 2.0**-10, "queries": 4}
    yield case("FZOO, signs", f)
    normals = {"lr": 2.0**-13, "queries": 2, "distribution": "exact"}
    yield case("FZOO, normals", normals, schedule=True)
    yield case("FZOO, out of place", {**f, **out_of_place, "weight_decay": 4.0})
    yield case("FZOO, skipped and failed", f, events=bad)
    yield case("FZOO, capturable", {**f, "capturable": True})

    g = {"lr": 2.0**-13, "examples": 4}
    yield case("GRZO, defaults", {"examples": 4})
    yield case("GRZO, flipout", g, events=bad, groups=two)
    yield case("GRZO, normals", {**g, "distribution": "exact"})
    yield case("GRZO, normals, capturable", {**g, "distribution": "exact", "capturable": True})

    epochs = {"steps_per_epoch": 10, "exponent": 1.5, "queries": 5}
    yield case("AdaZeta, defaults", {"steps_per_epoch": 10, "exponent": 1.5})
    yield case("AdaZeta, plain", {**z, **epochs}, events=skips)
    signs = {**z, **epochs, "distribution": "rademacher", "alpha": 1.0}
    yield case("AdaZeta, signs, two groups", signs, groups=two)

    h = {"lr": 0.02, "alpha": 0.001}
    yield case("HiZOO, defaults", {})
    yield case("HiZOO, plain", h)
    yield case("HiZOO, bfloat16 buffers", {**h, "buffer_dtype": "bfloat16", "alpha": 0.01})
    yield case("HiZOO, out of place", {**h, **out_of_place})
    yield case("HiZOO, two groups, skipped and failed", h, groups=two, events=bad)
    yield case("HiZOO, capturable", {**h, "capturable": True}, events=skips)

    # Some elements have a curvature above the clip, and some have not.
    n = {"lr": 2.0**-11, "betas": (0.9, 0.875), "clip": 2.0**-5, "gamma": 0.5}
    n |= {"anneal": 20.0, "curvature_every": 3}
    yield case("HELENE, defaults", {})
    yield case("HELENE, loss", n)
    yield case("HELENE, sampled", {**n, "curvature": "sampled", "batch_size": 4}, sampled=True)
    sampled = {**n, "curvature": "sampled", "batch_size": 4, "buffer_dtype": "bfloat16"}
    yield case("HELENE, sampled, skipped and failed", sampled, sampled=True, events=bad)
    nearest = {**n, "buffer_dtype": "bfloat16", "rounding": "nearest"}
    yield case("HELENE, bfloat16 buffers, nearest", nearest)
    yield case("HELENE, out of place", {**n, **out_of_place, "weight_decay": 1.0})
    slower = tuple({**group, "lr": group["lr"] / 8} for group in two)
    yield case("HELENE, two groups", n, groups=slower)
    yield case("HELENE, capturable", {**n, "capturable": True}, events=skips)

    yield case("ZOAdam, defaults", {})
    yield case("ZOAdam, plain", {"lr": 0.01})
    yield case("ZOAdam, bfloat16 buffers", {"lr": 0.01, "buffer_dtype": "bfloat16"})
    nearest = {"lr": 0.01, "buffer_dtype": "bfloat16", "rounding": "nearest", "betas": (0.5, 0.75)}
    yield case("ZOAdam, bfloat16 buffers, nearest", nearest)
    yield case("ZOAdam, low rank", {"lr": 0.01, "distribution": "lowrank"})
    yield case("ZOAdam, signs", {"lr": 0.01, "distribution": "rademacher"})
    yield case("ZOAdam, out of place", {"lr": 0.01, **out_of_place})
    yield case("ZOAdam, two groups, skipped and failed", {}, groups=two, events=bad, schedule=True)
    yield case("ZOAdam, float16", {"lr": 0.01}, dtype="float16")
    yield case("ZOAdam, capturable", {"lr": 0.01, "capturable": True})

    u = {"lr": 0.01, "warmup": 6, "anneal": 35}
    yield case("ZOAdaMU, defaults", {})
    yield case("ZOAdaMU, annealed", u)
    yield case("ZOAdaMU, bfloat16 buffers", {**u, "buffer_dtype": "bfloat16"})
    yield case("ZOAdaMU, out of place", {**u, **out_of_place})
    yield case("ZOAdaMU, two groups, skipped and failed", u, groups=two, events=bad)
    yield case("ZOAdaMU, signs", {**u, "distribution": "rademacher", "weight_decay": 0.5})


CASES = dict(_cases())

ALIKE = {
    "AdaMeZO, capturable": "AdaMeZO, paper",
    "AdaMeZO, capturable, skipped": "AdaMeZO, skipped",
    "AdaMeZO, capturable, bias corrected": "AdaMeZO, bias corrected",
    "ScalarAdaMeZO, capturable": "ScalarAdaMeZO, paper",
    "MeZO, capturable": "MeZO, two directions",
    "MEAZO, capturable": "MEAZO, plain",
    "FZOO, capturable": "FZOO, signs",
    "GRZO, normals, capturable": "GRZO, normals",
    "ZOAdam, capturable": "ZOAdam, plain",
    "MeZO, one direction": "AdaMeZO, no betas",
}
"""Runs that have the same weights and buffers as another. No other two have."""

STATES = {
    "AdaMeZO": "AdaMeZO, two groups",
    "AdaMeZO-capturable": "AdaMeZO, capturable, skipped",
    "AdaMeZO-out-of-place": "AdaMeZO, out of place",
    "AdaMeZO-warmup": "AdaMeZO, warmup",
    "ScalarAdaMeZO": "ScalarAdaMeZO, two groups, skipped",
    "MeZO": "MeZO, linear",
    "MEAZO": "MEAZO, two groups",
    "FZOO": "FZOO, signs",
    "GRZO": "GRZO, flipout",
    "AdaZeta": "AdaZeta, plain",
    "HiZOO": "HiZOO, two groups, skipped and failed",
    "HELENE": "HELENE, sampled, skipped and failed",
    "ZOAdam": "ZOAdam, bfloat16 buffers",
    "ZOAdam-capturable": "ZOAdam, capturable",
    "ZOAdaMU": "ZOAdaMU, annealed",
}
"""Files in states/, without their ending, and the runs that they are of after HALF steps."""

LOGS = {
    "AdaMeZO": ("AdaMeZO, two groups", 0),
    "MeZO": ("MeZO, skipped and failed", 0),
    "HELENE": ("HELENE, sampled, skipped and failed", 0),
    "AdaMeZO-out-of-place": ("AdaMeZO, out of place, skipped and failed", 0),
    "AdaMeZO-resumed": ("AdaMeZO, two groups", HALF),
}
"""Files in logs/, without their ending: the runs, and after how many steps the log begins."""


def state_file(name: str) -> Path:
    return HERE / "states" / f"{name}.pt"


def log_file(name: str) -> Path:
    return HERE / "logs" / f"{name}.log"


# --- runs -----------------------------------------------------------------------------------------


class Run:
    """A run of a case, which may go on from a saved state."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = Model(None if case.dtype is None else getattr(torch, case.dtype))
        named = list(self.model.named_parameters())
        groups: list[dict[str, Any]] = [{"params": named}]
        if case.groups:
            cut = [name for name, _ in named].index("mixed.bias")
            parts = named[:cut], named[cut:]
            groups = [{"params": p, **g} for p, g in zip(parts, case.groups, strict=True)]
        method = getattr(adamezo, case.method)
        self.optimizer = method(groups, model=self.model, **case.options)
        self.lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step = 0
        self.trace: list[list[str]] = []
        """Of each step, also of those that failed: what became of it, what it returned, its losses
        and what it measured."""

    def to(self, stop: int) -> Run:
        """Goes on until so many steps are over."""
        for step in range(self.step, stop):
            what = self.case.events.get(step, "")
            if self.case.schedule:
                factor = (1.0, 0.5, 0.75)[step % 3]
                for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
                    group["lr"] = lr * factor
            if what.startswith("failed"):
                self._once(step, what)
                what = ""
            self._once(step, what)
            self.step = step + 1
        return self

    def _once(self, step: int, what: str) -> None:
        evaluations = 0

        def loss(of: int) -> Tensor | float:
            nonlocal evaluations
            evaluations += 1
            if what == ("failed" if evaluations == 1 else "failed later"):
                raise LookupError("there is no data")
            value = self.model(of)
            if what == "skipped" and evaluations == 2:
                value = math.nan
            # On a device a loss has to be a tensor.
            capturable = self.case.options.get("capturable")
            return torch.tensor(value, dtype=torch.float64) if capturable else value

        closures = [lambda: loss(step)]
        if self.case.sampled:
            closures.append(lambda: loss(step + 1000))
        optimizer = self.optimizer
        result: Any = math.nan
        outcome = "done"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a step is skipped
            try:
                result = optimizer.step(*closures)
            except LookupError:
                outcome = "failed"
        losses = () if outcome == "failed" else optimizer.losses  # else those of the step before
        self.trace.append(
            [outcome, *(float(x).hex() for x in (result, *losses, *optimizer.measured))]
        )

    def digest(self) -> str:
        return digest(self.model, self.optimizer)

    def history(self) -> list[dict[str, Any]]:
        """What each group keeps from step to step."""
        return [
            {
                name: hexed(group[name])
                for name in (*("steps", "next_direction", "skipped_in_a_row"), *KEPT)
                if name in group
            }
            for group in self.optimizer.state_dict()["param_groups"]
        ]

    def saved(self) -> dict[str, Any]:
        """Weights and state, by no memory of this run."""
        weights = {name: w.clone().contiguous() for name, w in self.model.weights().items()}
        return {"weights": weights, "state": self.optimizer.state_dict()}

    def load(self, saved: Mapping[str, Any], step: int) -> Run:
        with torch.no_grad():
            for name, weight in self.model.weights().items():
                weight.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["state"])
        self.step = step
        return self


KEPT = ("directions", "projected_grads", "s")
"""The histories of the methods."""


def hexed(value: Any) -> Any:
    """With floats as text that has all their bits."""
    if isinstance(value, list):
        return [hexed(one) for one in value]
    return value.hex() if isinstance(value, float) else value


def bits_of(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist())


def digest(model: Model, optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 of all weights, and of all that the optimizer keeps for them."""
    hashed = hashlib.sha256()
    for name, weight in model.weights().items():
        hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        hashed.update(bits_of(weight))
    for index, kept in sorted(optimizer.state_dict()["state"].items()):
        for name, buffer in sorted(kept.items()):
            hashed.update(f"{index} {name} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
            hashed.update(bits_of(buffer))
    return hashed.hexdigest()


def result_of(name: str) -> tuple[dict[str, Any], list[list[str]]]:
    """What is kept of a run: in runs.json, and in traces.json.gz."""
    run = Run(CASES[name])
    digests = {str(stop): run.to(stop).digest() for stop in STOPS}
    return {"digests": digests, "history": run.history()}, run.trace


def begun(log: str) -> Run:
    """The run of a log, where it begins."""
    name, begin = LOGS[log]
    run = Run(CASES[name])
    if begin:
        (state,) = (state for state, of in STATES.items() if of == name)
        run.load(torch.load(state_file(state), weights_only=True), begin)
    return run


def write_log(log: str, path: Path, stop: int = STEPS) -> bytes:
    run = begun(log)
    with step_log.StepLog.create(path, run.optimizer, run=IN_HEADER):
        run.to(stop)
    return path.read_bytes()


IN_HEADER = {"made by": "tests/golden", "number": 0.1, "list": [1, "two", None, True]}


def state_as_text(value: Any) -> Any:
    """A state_dict, with every bit of its tensors and floats as text. Without the name of the
    perturbation, which may be given another, and tuples are lists."""
    if isinstance(value, Mapping):
        return {str(k): state_as_text(v) for k, v in value.items() if k != "perturbation"}
    if isinstance(value, (list, tuple)):
        return [state_as_text(one) for one in value]
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), bits_of(value).hex()]
    return hexed(value)


# --- directions -----------------------------------------------------------------------------------


def _placed() -> Iterator[tuple[int, int, int, int, int]]:
    """(elements, seed, direction, parameter, offset)"""
    yield 5003, SEED, 0, 0, 0
    yield 1, 0, 0, 0, 0
    yield 37, 2**64 - 1, 2**32 - 1, 2**24 - 1, 2**63 - 64
    yield 259, 1, 2, 3, 4
    for offset in (1, 2, 3, 5, 1023, 2**32 - 7, 2**34 - 130, 2**34 + 1, 2**39 - 130, 2**62 + 3):
        yield 259, SEED, 7, 11, offset
    for direction, parameter in ((1, 0), (0, 1), (2**31, 2**23), (65537, 4097)):
        yield 130, SEED, direction, parameter, 0


_SHARDS = {
    "from 5": ((41,), Shard(5)),
    "one row beyond 2^34": ((700,), Shard(2**34 - 300)),
    "rows of 9 of 1000 beyond 2^33": ((7, 9), Shard(2**33 + 2, 7, 1000)),
    "rows of 64 far apart": ((3, 64), Shard(7, 3, 2**35 + 1)),
    "rows across 2^39": ((5, 33), Shard(2**39 - 80, 5, 33)),
}

DISTRIBUTIONS = ("exact", "rademacher")  # the bits of the third are a device's own


def directions(backend: str | None = None) -> dict[str, str]:
    """SHA-256 of elements of directions, by what they are."""
    found = {}
    for distribution in DISTRIBUTIONS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            kind = f"{distribution}, {str(dtype).removeprefix('torch.')}"
            for numel, seed, counter, parameter, offset in _placed():
                z = sample_(
                    torch.full((numel,), math.nan, dtype=dtype),
                    PhiloxState(seed, counter, offset),
                    parameter=parameter,
                    distribution=distribution,
                    backend=backend,
                )
                name = f"{kind}: {numel} of {seed:#x}, {counter}, {parameter}, {offset:#x}"
                found[name] = hashlib.sha256(bits_of(z)).hexdigest()
            for what, (shape, shard) in _SHARDS.items():
                z = torch.zeros(shape, dtype=dtype)
                plan = Plan([z], parameters=[13], shards=[shard])
                state = PhiloxState(SEED, 21)
                perturb_(plan, state, 1.0, distribution=distribution, backend=backend)
                found[f"{kind}: {what}"] = hashlib.sha256(bits_of(z)).hexdigest()
    return found


_MATRICES = {
    "37 x 7": ((37, 7), Shard(columns=7), 0),
    "3 x 700": ((3, 700), Shard(columns=700), 0),
    "2 x 3 x 5 x 4": ((2, 3, 5, 4), Shard(columns=60), 0),
    "5 rows of 130 from row 2^33": ((5, 130), Shard(columns=130), 130 * 2**33),
    "rows of 9 of 1000 from (6, 995) on": ((7, 5), Shard(6995, 7, 1000, 1000), 0),
    "from the middle of a row of 2^34": ((300,), Shard(2**34 - 150, columns=2**34), 0),
    "a vector": ((41,), Shard(5, columns=0), 2**34 - 20),
}


def low_rank_directions(backend: str | None = None) -> dict[str, str]:
    """The same of low-rank directions."""
    found = {}
    for distribution in ("lowrank", "lowrank:3"):
        for what, (shape, shard, offset) in _MATRICES.items():
            z = torch.zeros(shape)
            plan, state = Plan([z], parameters=[13], shards=[shard]), PhiloxState(SEED, 21, offset)
            perturb_(plan, state, 1.0, distribution=distribution, backend=backend)
            found[f"{distribution}: {what}"] = hashlib.sha256(bits_of(z)).hexdigest()
    return found


# --- in a process of its own ----------------------------------------------------------------------

IN_TRITON = (
    "AdaMeZO, two groups",
    "AdaMeZO, signs",
    "AdaMeZO, out of place, skipped and failed",
    "ScalarAdaMeZO, bias corrected",
    "MeZO, skipped and failed",
    "MEAZO, two groups",
    "FZOO, signs",
    "GRZO, normals",
    "AdaZeta, signs, two groups",
    "HiZOO, bfloat16 buffers",
    "HELENE, sampled, skipped and failed",
    "ZOAdam, bfloat16 buffers, nearest",
    "ZOAdaMU, annealed",
)
"""Runs for the interpreter, to which a step takes half a second: all methods, and whatever its
kernel is told."""


def main() -> None:
    """Prints what the environment's backend gives (TRITON_INTERPRET=1 ADAMEZO_BACKEND=triton)."""
    torch.set_num_threads(1)
    able, reason = triton.availability()
    found: dict[str, Any] = {"able": able, "reason": reason}
    if able:
        found["directions"] = {**directions(), **low_rank_directions()}
        found["runs"] = {name: Run(CASES[name]).to(FIRST).digest() for name in IN_TRITON}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
