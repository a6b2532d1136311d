"""How fast are the kernels on a GPU, CUDA's and Triton's, beside pure torch and beside a copy?

    python -m benchmarks.gpu_kernels            minutes
    python -m benchmarks.gpu_kernels --quick    under a minute; fewer sizes, types and repeats

Needs a GPU. Writes benchmarks/results/kernels_gpu.csv, of the same rows as the benchmark of
the CPU. Bits come first: `exact` must equal the CPU's, or nothing is timed. Timed with events, the
variants in turn; what fits into a cache says so by its size.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adamezo_kernels import ops
from adamezo_kernels.backends import BACKENDS
from adamezo_kernels.plan import Plan
from adamezo_kernels.stream import ROUNDINGS, PhiloxState
from adamezo_kernels.terms import RULES, Terms
from benchmarks.cuda_budget import CLOCK_HZ, LANES, SCHEDULERS
from benchmarks.kernels import HORIZONS, SEED, TYPES, coefficients
from benchmarks.rows import RESULTS, Row, conditions, timing, write_rows

SIZES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
# The low-rank matrices of 48 layers with four adapted projections each, of rank 8.
LORA = [(8, 4096), (4096, 8)] * (48 * 4)
# Numbers of a step of each rule that many calls leave as they are, from buffers of ones.
NUMBERS = {
    "adam": (0.9, 0.1, 0.999, 0.001, 1.0, 1.0),
    "hizoo": (-1e-9, 1e-9, 1.0),
    "helene": (0.9, 0.1, 0.99, 0.01, 1.0, 0.3),
    "adamu": (0.8, 0.6, 0.9, 0.1, 0.9, 0.1, 1.0),
}
TORCH_CHUNK = 1 << 26  # elements: z, m, v and the weights in float32 beside 1e9 weights need room


@dataclass
class Timed:
    name: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    bytes_moved: int = 0
    """Of a weight, where that is not once read and once written."""


def backends() -> list[str]:
    """Those that can run on the device here, the preferred first; says why others cannot."""
    able = []
    for name in ("cuda", "triton"):
        available, reason = BACKENDS[name].availability()
        if available:
            able.append(name)
        else:
            print(f"without {name}: {reason}")
    if not able or not torch.cuda.is_available():
        raise SystemExit("gpu_kernels: needs a GPU, and CUDA or Triton kernels for it")
    return able


def device_gate(on_device: str) -> None:
    """Raises where `exact` on the device differs from the CPU in a bit of what is timed."""
    for dtype, rounding in itertools.product(TYPES.values(), ROUNDINGS):
        results = []
        options = {"rounding": rounding}
        for device, backend in (("cpu", "native"), ("cuda", on_device)):
            generator = torch.Generator().manual_seed(0)
            made = [(0.02 * torch.randn(n, generator=generator)).to(dtype) for n in (4099, 1, 37)]
            plan = Plan([w.to(device) for w in made])
            states = [PhiloxState(SEED, k) for k in range(10)]
            options["backend"] = backend
            ops.perturb_(plan, states[0], 1e-3, **options)
            ops.update_(plan, states, *coefficients(10), lr=1e-2, restore=-1e-3, **options)
            out = plan.into([torch.empty_like(s.tensor) for s in plan])
            ops.perturb_(out, states[1], 1e-3, **options)
            done = [s.tensor for p in (plan, out) for s in p]
            for rule in NUMBERS:
                kept = [
                    [torch.ones_like(s.tensor) for _ in range(RULES[rule].buffers)] for s in plan
                ]
                plan = plan.with_buffers(kept)
                ops.perturb_(plan, rule_terms(rule), 1e-3, **options)
                ops.update_terms_(plan, rule_terms(rule), restore=-1e-3, **options)
                done += [buffer for buffers in kept for buffer in buffers]
            results.append([tensor.cpu() for tensor in done])
        for got, expected in zip(*results, strict=True):
            wrong = int((got != expected).sum())
            if wrong:
                raise SystemExit(
                    f"{wrong} weights in {dtype}, stored {rounding}, differ from the CPU's bits by "
                    f"{on_device}, expected none. No speed is measured: run `make gpu-check` first"
                )


def rule_terms(rule: str, lr: float = 1e-2) -> Terms:
    states = [PhiloxState(SEED, k) for k in range(RULES[rule].directions)]
    return Terms.of(states, minus_lr=-lr, rule=rule, numbers=NUMBERS[rule])


class TorchCalls:
    """The operations with torch's own calls on the device, chunk by chunk, in float32 sums."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        self.generator = torch.Generator(device="cuda")

    def _chunks(self) -> Iterator[torch.Tensor]:
        return itertools.chain.from_iterable(t.view(-1).split(TORCH_CHUNK) for t in self.tensors)

    def _z(self, like: torch.Tensor, seed: int) -> torch.Tensor:
        z = torch.empty(like.shape, device="cuda")
        return z.normal_(generator=self.generator.manual_seed(seed))

    def perturb_(self, seed: int, scale: float) -> None:
        for theta in self._chunks():
            theta.add_(self._z(theta, seed), alpha=scale)

    def update_(self, first: Sequence[float], second: Sequence[float], lr: float) -> None:
        for theta in self._chunks():
            m = torch.zeros(theta.shape, device="cuda")
            v = torch.zeros(theta.shape, device="cuda")
            for age, (a, b) in enumerate(zip(first, second, strict=True)):
                z = self._z(theta, SEED + age)
                m.add_(z, alpha=a)
                v.addcmul_(z, z, value=b)
            theta.sub_(m.div_(v.sqrt_().add_(1e-8)), alpha=lr)


def variants(
    tensors: list[torch.Tensor],
    what: str,
    horizon: int,
    able: Sequence[str],
    *,
    apart: bool = False,
) -> list[Timed]:
    """The variants of a case. Tiny steps: many calls must leave the weights ordinary numbers."""
    states = [PhiloxState(SEED, horizon - age) for age in range(horizon)]
    first, second = coefficients(horizon)
    lr = scale = 1e-9
    plan = Plan(tensors)
    made: list[Timed] = []
    calls = TorchCalls(tensors)

    def ours(
        name: str, plans: Sequence[Plan], distribution: str, rounding: str, backend: str
    ) -> None:
        options = {"distribution": distribution, "rounding": rounding, "backend": backend}
        name += ", Triton" * (backend == "triton")
        made.append(Timed(name, functools.partial(_run, what, plans, states, scale, lr, options)))

    for backend in able:
        for distribution in BACKENDS[backend].DISTRIBUTIONS:
            ours(distribution, [plan], distribution, "nearest", backend)
            if tensors[0].dtype != torch.float32:
                ours(f"{distribution}, stochastic", [plan], distribution, "stochastic", backend)
    if apart:
        single = [Plan([t]) for t in tensors]
        ours("exact, a launch a tensor", single, "exact", "nearest", able[0])
    if what == "perturb":
        copies = [torch.empty_like(t) for t in tensors]
        ours("exact, out of place", [plan.into(copies)], "exact", "nearest", able[0])
        made.append(Timed("torch", functools.partial(calls.perturb_, SEED, scale)))
        made.append(Timed("copy", lambda: torch._foreach_copy_(copies, tensors)))
    else:
        made.append(Timed("torch", functools.partial(calls.update_, first, second, lr)))
    return made


def rule_variants(tensors: list[torch.Tensor], rule: str, able: Sequence[str]) -> list[Timed]:
    """Updates by a rule that keeps numbers, and a copy of as many bytes for each of their types."""
    made = []
    rounding = "nearest" if tensors[0].dtype == torch.float32 else "stochastic"
    for type_name in ("float32", "bfloat16"):
        dtype = TYPES[type_name]
        kept = [
            [torch.ones(t.shape, dtype=dtype, device="cuda") for _ in range(RULES[rule].buffers)]
            for t in tensors
        ]
        plan = Plan(tensors).with_buffers(kept)
        moved = 2 * (tensors[0].element_size() + RULES[rule].buffers * dtype.itemsize)
        for backend in able:
            for distribution in BACKENDS[backend].DISTRIBUTIONS:
                options = dict(distribution=distribution, rounding=rounding, backend=backend)
                name = f"{distribution}, {rounding}, {type_name} numbers"
                name += ", Triton" * (backend == "triton")
                call = functools.partial(
                    ops.update_terms_, plan, rule_terms(rule, 1e-9), restore=1e-9, **options
                )
                made.append(Timed(name, call, bytes_moved=moved))
        all_of_it = [*tensors, *(buffer for buffers in kept for buffer in buffers)]
        copies = [torch.empty_like(t) for t in all_of_it]
        call = functools.partial(torch._foreach_copy_, copies, all_of_it)
        made.append(Timed(f"copy, {type_name} numbers", call, bytes_moved=moved))
    return made


def _run(
    what: str,
    plans: Sequence[Plan],
    states: Sequence[PhiloxState],
    scale: float,
    lr: float,
    options: dict[str, str],
) -> None:
    for plan in plans:
        if what == "perturb":
            ops.perturb_(plan, states[0], scale, **options)
        else:
            ops.update_(plan, states, *coefficients(len(states)), lr=lr, restore=scale, **options)


def interleave(timed: Sequence[Timed], repeats: int, sample_s: float = 2e-3) -> None:
    """Times the variants in turn, by events around several calls of the short ones."""

    def once(run: Callable[[], object], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    calls = []
    for t in timed:
        once(t.run, 1)  # loads the kernel
        calls.append(max(1, round(sample_s / once(t.run, 1))))
    for _ in range(repeats):
        for t, n in zip(timed, calls, strict=True):
            t.seconds.append(once(t.run, n))


def rows_of(
    what: str, type_name: str, elements: int, horizon: int, timed: Sequence[Timed], where: dict
) -> list[Row]:
    size = TYPES[type_name].itemsize
    by_name = {t.name: timing(t.seconds)["median_s"] for t in timed}
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    made = []
    for t in timed:
        columns = timing(t.seconds)
        median = columns["median_s"]
        normals = elements * horizon if not t.name.startswith("copy") else 0
        made.append(
            Row(
                benchmark="gpu_kernels",
                what=what,
                variant=t.name,
                type=type_name,
                elements=elements,
                horizon=horizon if normals else 0,
                reference="torch" if normals and "torch" in by_name else "",
                ratio=by_name["torch"] / median if normals and "torch" in by_name else None,
                elements_per_s=elements / median,
                normals_per_s=normals / median if normals else None,
                bytes_per_s=(t.bytes_moved or 2 * size) * elements / median,
                # Issue slots there were for each normal: at least those that cuda_budget counts.
                cycles_per_normal=(
                    median * CLOCK_HZ * multiprocessors * SCHEDULERS * LANES / normals
                    if normals
                    else None
                ),
                **columns,  # type: ignore[arg-type]
                **where,  # type: ignore[arg-type]
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, for a first look")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels_gpu.csv")
    arguments = parser.parse_args()

    able = backends()
    for name in able:
        device_gate(name)
    print("bits equal the CPU's in `exact`", flush=True)
    where = conditions() | {
        "device": torch.cuda.get_device_name(),
        "clock_hz": CLOCK_HZ,
        "clock_source": "assumed",
    }
    types = ["bfloat16"] if arguments.quick else list(TYPES)
    sizes = SIZES[:2] if arguments.quick else SIZES
    horizons = (1, 10) if arguments.quick else HORIZONS
    repeats = 5 if arguments.quick else 15
    cases = [
        (what, type_name, [(n,)], horizon)
        for type_name, n in itertools.product(types, sizes)
        for what, horizon in [("perturb", 1), *(("update", h) for h in horizons)]
    ]
    cases += [("perturb lora", "bfloat16", LORA, 1), ("update lora", "bfloat16", LORA, 10)]
    cases += [
        (f"update {rule}", "bfloat16", [(n,)], RULES[rule].directions)
        for rule, n in itertools.product(NUMBERS, sizes)
    ]
    made: list[Row] = []
    for what, type_name, shapes, horizon in cases:
        tensors = [torch.randn(s, device="cuda").mul_(0.02).to(TYPES[type_name]) for s in shapes]
        operation, _, of = what.partition(" ")
        if of in NUMBERS:
            timed = rule_variants(tensors, of, able)
        else:
            timed = variants(tensors, operation, horizon, able, apart=len(tensors) > 1)
        interleave(timed, repeats)
        elements = sum(t.numel() for t in tensors)
        made += rows_of(what, type_name, elements, horizon, timed, where)
        shown = ", ".join(
            f"{r.variant} {(r.elements_per_s or 0) / 1e9:.3g} G/s" for r in made[-len(timed) :]
        )
        print(f"{what} {type_name} {elements:.0e} H={horizon}: {shown}", flush=True)
        write_rows(arguments.output, made)
        del tensors, timed
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
