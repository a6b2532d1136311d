"""How fast are the kernels on a GPU, CUDA's and Triton's, beside pure torch and beside a copy?

    python -m benchmarks.gpu_kernels            minutes
    python -m benchmarks.gpu_kernels --quick    under a minute; fewer sizes, types and repeats

Needs a GPU. Writes benchmarks/results/kernels_gpu.csv, of the same rows as `benchmarks.kernels`.
Bits come first: `exact` must equal the CPU's, or nothing is timed. Timed with events, the variants
in turn; what fits into a cache says so by its size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import RULES, ops
from adamezo_kernels.backends import BACKENDS
from adamezo_kernels.plan import Plan
from adamezo_kernels.stream import PhiloxState
from benchmarks.harness import RULE_NUMBERS, Variant, gate, interleave, rule_terms
from benchmarks.kernels import HORIZONS, SEED, TYPES, coefficients
from benchmarks.results import Row, on, parser, settings, spread, write

SIZES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
# The low-rank matrices of 48 layers with four adapted projections each, of rank 8.
LORA = [(8, 4096), (4096, 8)] * (48 * 4)
TORCH_CHUNK = 1 << 26  # elements: z, m, v and the weights in float32 beside 1e9 weights need room
TINY = 1e-9  # a step: many calls must leave the weights ordinary numbers

on_gpu = functools.partial(Variant, device="cuda")


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


class TorchCalls:
    """The operations with torch's own calls on the device, chunk by chunk, in float32 sums: there
    arithmetic on mixed types is as fast as on one."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.generator = torch.Generator(device="cuda")

    def _chunks(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(t.view(-1).split(TORCH_CHUNK) for t in self.tensors)

    def _z(self, like: Tensor, seed: int) -> Tensor:
        z = torch.empty(like.shape, device="cuda")
        return z.normal_(generator=self.generator.manual_seed(seed))

    def perturb_(self) -> None:
        for theta in self._chunks():
            theta.add_(self._z(theta, SEED), alpha=TINY)

    def update_(self, first: Sequence[float], second: Sequence[float]) -> None:
        for theta in self._chunks():
            m, v = torch.zeros((2, *theta.shape), device="cuda")
            for age, (a, b) in enumerate(zip(first, second, strict=True)):
                z = self._z(theta, SEED + age)
                m.add_(z, alpha=a)
                v.addcmul_(z, z, value=b)
            theta.sub_(m.div_(v.sqrt_().add_(1e-8)), alpha=TINY)


def variants(
    tensors: list[Tensor], what: str, horizon: int, able: Sequence[str], *, apart: bool = False
) -> list[Variant]:
    """The variants of a perturbation or an update by sums of directions; `apart` with one launch a
    tensor too."""
    states = [PhiloxState(SEED, horizon - age) for age in range(horizon)]
    first, second = coefficients(horizon)

    def run(plans: Sequence[Plan], options: dict[str, str]) -> None:
        for plan in plans:
            if what == "perturb":
                ops.perturb_(plan, states[0], TINY, **options)
            else:
                ops.update_(plan, states, first, second, lr=TINY, restore=TINY, **options)

    def ours(name: str, plans: Sequence[Plan], backend: str = able[0], **kind: str) -> Variant:
        name += ", Triton" * (backend == "triton")
        return on_gpu(name, functools.partial(run, plans, kind | {"backend": backend}))

    plan = [Plan(tensors)]
    roundings = ("nearest",) if tensors[0].dtype == torch.float32 else ("nearest", "stochastic")
    made = [
        ours(
            distribution + ", stochastic" * (rounding == "stochastic"),
            *(plan, backend),
            distribution=distribution,
            rounding=rounding,
        )
        for backend in able
        for distribution in BACKENDS[backend].DISTRIBUTIONS
        for rounding in roundings
    ]
    if apart:
        made.append(ours("exact, a launch a tensor", [Plan([t]) for t in tensors]))
    calls = TorchCalls(tensors)
    if what == "perturb":
        copies = [torch.empty_like(t) for t in tensors]
        made.append(ours("exact, out of place", [plan[0].into(copies)]))
        made.append(on_gpu("torch", calls.perturb_))
        made.append(on_gpu("copy", functools.partial(torch._foreach_copy_, copies, tensors)))
    else:
        made.append(on_gpu("torch", functools.partial(calls.update_, first, second)))
    return made


def rule_variants(tensors: list[Tensor], rule: str, able: Sequence[str]) -> list[Variant]:
    """Updates by a rule that keeps numbers, and a copy of as many bytes for each of their types."""
    made = []
    rounding = "nearest" if tensors[0].dtype == torch.float32 else "stochastic"
    for kept_type in ("float32", "bfloat16"):
        kind = dict(dtype=TYPES[kept_type], device="cuda")
        buffers = range(RULES[rule].buffers)
        kept = [[torch.ones(t.shape, **kind) for _ in buffers] for t in tensors]  # type: ignore
        plan = Plan(tensors).with_buffers(kept)
        terms = rule_terms(rule, TINY)
        for backend, distribution in [(b, d) for b in able for d in BACKENDS[b].DISTRIBUTIONS]:
            options = dict(distribution=distribution, rounding=rounding, backend=backend)
            name = f"{distribution}, {rounding}, {kept_type} numbers"
            call = functools.partial(ops.update_terms_, plan, terms, restore=TINY, **options)
            made.append(on_gpu(name + ", Triton" * (backend == "triton"), call))
        everything = [*tensors, *(buffer for some in kept for buffer in some)]
        copies = [torch.empty_like(t) for t in everything]
        call = functools.partial(torch._foreach_copy_, copies, everything)
        made.append(on_gpu(f"copy, {kept_type} numbers", call))
    return made


def main() -> None:
    arguments = parser(__doc__, "kernels_gpu.csv").parse_args()
    quick = arguments.quick
    able = backends()
    for name in able:
        gate(TYPES.values(), backend=name, device="cuda")
    print("bits equal the reference's in `exact`", flush=True)
    where = on("cuda")
    sizes, types = (SIZES[:2], ["bfloat16"]) if quick else (SIZES, list(TYPES))
    cases: list[tuple[str, str, list[Any], int]] = [
        (what, kind, [(n,)], horizon)
        for kind, n in itertools.product(types, sizes)
        for what, horizon in [
            ("perturb", 1),
            *(("update", h) for h in ((1, 10) if quick else HORIZONS)),
        ]
    ]
    cases += [("perturb lora", "bfloat16", LORA, 1), ("update lora", "bfloat16", LORA, 10)]
    cases += [
        (f"update {rule}", "bfloat16", [(n,)], RULES[rule].directions)
        for rule, n in itertools.product(RULE_NUMBERS, sizes)
    ]
    made: list[Row] = []
    for what, kind, shapes, horizon in cases:
        tensors = [torch.randn(s, device="cuda").mul_(0.02).to(TYPES[kind]) for s in shapes]
        operation, _, of = what.partition(" ")
        if of in RULE_NUMBERS:
            timed = rule_variants(tensors, of, able)
        else:
            timed = variants(tensors, operation, horizon, able, apart=len(tensors) > 1)
        interleave(timed, repeats=5 if quick else 15, sample_s=2e-3)
        elements = sum(t.numel() for t in tensors)
        columns = settings(what=what, type=kind, horizon=horizon)
        for v in timed:
            name = ("gpu_kernels", "time", "s", v.name, columns, "elements", elements)
            made.append(Row(*name, **spread(v.seconds), **where))
        shown = ", ".join(
            f"{r.variant} {elements / (r.median or 1) / 1e9:.3g} G/s" for r in made[-len(timed) :]
        )
        print(f"{what} {kind} {elements:.0e} H={horizon}: {shown}", flush=True)
        write(arguments.output, made)
        del tensors, timed
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
