"""What would a second version of the stream gain, and what would it lose? A trial, not a feature.

    python -m benchmarks.stream_2             minutes; all of the following
    python -m benchmarks.stream_2 times       a minute; sample and update beside version 1's
    python -m benchmarks.stream_2 words       minutes; the distribution of all 2^32 words
    python -m benchmarks.stream_2 sass        a minute; instructions of the CUDA kernels, with nvcc

Needs a C++ compiler (CXX, c++ or g++), which compiles stream_2.cpp for each instruction set. Writes
benchmarks/results/stream_2.csv; docs/stream_2.md says what the variants are and what follows.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import Plan, ops
from adamezo_kernels.backends import native
from adamezo_kernels.stream import PhiloxState
from adamezo_kernels.terms import Terms
from benchmarks.budget import ELEMENTS_OF_A_THREAD, compiled_by_nvcc, without_cuda
from benchmarks.harness import GateError, Variant, interleave
from benchmarks.library_calls import coefficients
from benchmarks.results import Row, conditions, load, parser, settings, spread, write
from benchmarks.sass import PIPES, loop_cycles, nvcc, run
from benchmarks.stream_2_trial import (
    HERE,
    VERSIONS,
    WINDOW,
    Version,
    compiler,
    of_all_words,
    of_samples,
    sample,
    updater,
)

# The distribution --------------------------------------------------------------------------------


def distributions(isa: str, where: dict[str, Any], quick: bool) -> Iterator[Row]:
    log2, seen = 24 if quick else 32, list[Version]()
    for version in VERSIONS:
        if any((version.form, version.short) == (v.form, v.short) for v in seen):
            continue  # its pairs are the other's, of other words
        seen.append(version)
        found = (of_all_words if version.one_word else of_samples)(version, isa, log2)
        made = found.measures()
        of = settings(what="all words" if version.one_word else "sampled")
        for metric, value in (made | {"normals": found.normals}).items():
            yield Row("stream 2", metric, "1", version.name, of, median=value, **where)
        print(version.name, {k: float(f"{v:.3g}") for k, v in made.items()}, flush=True)


# The times ---------------------------------------------------------------------------------------

KEY, HORIZON = 2026, 10
# A call takes about 1 ms: of many some are not interrupted, whatever else runs.
ELEMENTS = {"sample": WINDOW * 1953, "update": WINDOW * 195}
RESTORE, MINUS_LR = 1e-9, -1e-9
FIRST, SECOND = coefficients([0.5 * (-1) ** age for age in range(HORIZON)], (0.7, 0.9))
DIRECTIONS = [HORIZON - age for age in range(HORIZON)]


def shipped(what: str, tensor: Tensor) -> Callable[[], object]:
    """The package's own kernel for what is timed."""
    if what == "sample":
        return functools.partial(ops.sample_, tensor, PhiloxState(KEY, 1), backend="native")
    states = [PhiloxState(KEY, direction) for direction in DIRECTIONS]
    terms = Terms.of(states, FIRST, SECOND, minus_lr=MINUS_LR)
    of = dict(eps=1e-8, restore=RESTORE, backend="native")
    return functools.partial(ops.update_terms_, Plan([tensor]), terms, **of)


def tried(what: str, version: Version, isa: str, tensor: Tensor) -> Callable[[], object]:
    if what == "sample":
        return functools.partial(sample, tensor, version, isa, key=KEY, direction=1)
    return updater(
        *(tensor, version, isa),
        **dict(key=KEY, directions=DIRECTIONS, first=FIRST, second=SECOND),
        **dict(restore=RESTORE, minus_lr=MINUS_LR),
    )


def tensor_for(what: str, elements: int) -> Tensor:
    if what == "sample":
        return torch.empty(elements)
    generator = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(elements, generator=generator)).bfloat16()


def gate(what: str, isa: str) -> None:
    """Raises GateError unless the trial's version 1 has the bits of the package's kernels."""
    ours, theirs = (tensor_for(what, 8 * WINDOW) for _ in range(2))
    tried(what, VERSIONS[0], isa, ours)()
    shipped(what, theirs)()
    if not torch.equal(ours, theirs):
        raise GateError(f"{what} by the trial's version 1 on {isa} is not the package's: mend it")


def times(isa: str, where: dict[str, Any], quick: bool) -> Iterator[Row]:
    for what in ("sample", "update"):
        gate(what, isa)
        tensor = tensor_for(what, ELEMENTS[what])
        inside = functools.partial(native.use_isa, isa)
        timed = [Variant("as shipped", shipped(what, tensor), isa=isa, context=inside)]
        timed += [Variant(v.name, tried(what, v, isa, tensor), isa=isa) for v in VERSIONS]
        interleave(timed, repeats=5 if quick else 301, sample_s=5e-4)
        of = dict(type={"sample": "float32", "update": "bfloat16"}[what], threads=1, isa=isa)
        columns = settings(what=what, horizon=1 if what == "sample" else HORIZON, **of)
        for variant in timed:
            numbers = {"time": spread(variant.seconds), "least time": {}}
            numbers["least time"] = dict(median=min(variant.seconds), repeats=len(variant.seconds))
            for metric, values in numbers.items():
                key = ("stream 2", metric, "s", variant.name, columns, "elements", ELEMENTS[what])
                yield Row(*key, **values, **where)
        base = min(timed[1].seconds)
        ratios = ", ".join(f"{v.name} {base / min(v.seconds):.2f}x" for v in timed)
        print(f"{what} {isa}: {base * 1e3:.1f} ms; {ratios}", flush=True)


def predictions(where: dict[str, Any]) -> Iterator[Row]:
    for what in ("sample", "update"):
        for version in VERSIONS:
            columns = settings(what=what, isa="avx512")
            key = ("stream 2", "instructions predicted", "1", version.name, columns)
            yield Row(*key, median=version.instructions(what) / 64, **where)


# The instructions of a GPU -----------------------------------------------------------------------


def counted(where: dict[str, Any]) -> Iterator[Row]:
    """Of the CUDA kernel for an update of bfloat16 weights, for each normal of its loop: the cycles
    of each pipe, those of "issue" being the instructions (sass.py)."""
    bodies = [
        f"Instance<Update<TrialNormals<trial::Stream<{v.rounds}, trial::Form::{form}, "
        f"{str(v.short).lower()}>>, true, Rounding::kNearest>, bfloat16>"
        for v in VERSIONS
        for form in [{"two words": "kWords", "halves": "kHalves", "lattice": "kLattice"}[v.form]]
    ]
    source = str(HERE / "stream_2.cuh")
    compiled = compiled_by_nvcc("sm_90", bodies, includes=[source])
    for version, (registers, spilled, code) in zip(VERSIONS, compiled, strict=True):
        _, loop, _ = loop_cycles(code, whole_program=False, besides="FCHK")
        counts = dict(zip(PIPES, map(float, loop / ELEMENTS_OF_A_THREAD), strict=True))
        columns = settings(what="update", by="CUDA", type="bfloat16", target="sm_90")
        numbers = {"registers": registers, "spilled": spilled}
        numbers |= {f"{pipe} cycles a normal": count for pipe, count in counts.items()}
        for metric, value in numbers.items():
            unit = "B" if metric == "spilled" else "1"
            yield Row("stream 2", metric, unit, version.name, columns, median=value, **where)
        busy = ", ".join(f"{pipe} {count:.2f}" for pipe, count in counts.items())
        print(f"{version.name}: {registers} registers; {busy}", flush=True)


def compiler_version(path: str) -> str:
    """A compiler's name and version."""
    done = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True)
    return f"{Path(path).name} {done.stdout.strip()}"


def main() -> None:
    options = parser(__doc__, "stream_2.csv")
    options.add_argument("parts", nargs="*", metavar="PART", help="times, words, sass or all")
    arguments = options.parse_args()
    parts = arguments.parts or ["times", "words", "sass"]
    if unknown := sorted({*parts} - {"times", "words", "sass"}):
        raise SystemExit(f"stream_2: got the parts {unknown}, expected some of times, words, sass")
    if not compiler():
        raise SystemExit("stream_2: no C++ compiler: install one, or set CXX")
    isas = native.instruction_sets()
    if not isas:
        raise SystemExit("stream_2: the compiled module is not here: run `pip install -e .`")
    where, made = conditions(compiler=compiler_version(compiler())), []
    if "times" in parts:
        made += predictions(where)
        for isa in isas:
            if isa != "portable":
                made += times(isa, where, arguments.quick)
    if "words" in parts:
        made += distributions(isas[0], where, arguments.quick)
    if "sass" in parts:
        if lack := without_cuda():
            print(f"without CUDA: {lack}")
        else:
            said = run(nvcc(), "--version").split("V")[-1].split()[0]
            of = conditions(device="sm_90", clock_hz=None, compiler=f"nvcc {said}")
            made += counted(of)
    kinds = {row.settings for row in made}
    others = [row for row in load(arguments.output) if row.settings not in kinds]
    write(arguments.output, [*others, *made])
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
