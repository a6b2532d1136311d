"""What would a second version of the stream gain, and what would it lose? A trial, not a feature.

    python -m benchmarks.stream_2             minutes; all of the following
    python -m benchmarks.stream_2 times       a minute; sample and update beside version 1's
    python -m benchmarks.stream_2 words       minutes; the distribution of all 2^32 words
    python -m benchmarks.stream_2 sass        a minute; instructions of the CUDA kernels, with nvcc

Needs a C++ compiler (CXX, c++ or g++), which compiles stream_2.cpp for each instruction set. Writes
benchmarks/results/stream_2.csv; docs/stream_2.md says what the variants are and what follows.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import Plan, ops
from adamezo_kernels.backends import native
from adamezo_kernels.stream import PhiloxState
from adamezo_kernels.terms import Terms
from benchmarks.budget import compiled_by_nvcc, without_cuda
from benchmarks.harness import GateError, Variant, interleave
from benchmarks.library_calls import coefficients
from benchmarks.results import Row, conditions, load, parser, settings, spread, write
from benchmarks.sass import loop_sizes, nvcc, run

HERE = Path(__file__).resolve().parent
GOLDEN = 0x9E4F1BBD  # kGolden of stream_2.h
WINDOW = 512
"""Elements of which the trial's arrays are a multiple."""


@dataclass(frozen=True)
class Version:
    """A stream. `number` is its place in stream_2.cpp, `form` what a pair of normals is made of."""

    number: int
    rounds: int
    form: str = "two words"
    short: bool = False

    @property
    def name(self) -> str:
        if self.number == 0:
            return "version 1"
        form = f", {self.form}" * (self.form != "two words")
        return f"{self.rounds} rounds{form}{', short' * self.short}"

    @property
    def one_word(self) -> bool:
        return self.form != "two words"

    def instructions(self, what: str) -> float:
        """Of AVX-512 for 64 normals, counted in the source before anything was timed."""
        # A round multiplies, shifts and combines two words of two halves of the blocks. The first
        # three have no keys to compute with and no sharing left, and four shuffles merge halves.
        call = 16 + 12 * (self.rounds - 3) + 4
        # The logarithm with its root, the angle, sine, cosine, and both normals of a pair; another
        # shift for the second sign of halves, and for the lattice a product of two instructions.
        pair = (18 + 3 + 4 + 3 + 5) + {"two words": 0, "halves": 1, "lattice": 2}[self.form]
        pair -= 5 * self.short
        if what == "update":
            return call / (1 + self.one_word) + 2 * pair + 12  # two sums of four vectors
        # The words that directions share, a transposition and four stores.
        return (call + 12) / (1 + self.one_word) + 2 * pair + 12


VERSIONS = (
    Version(0, 10),
    Version(1, 7),
    Version(2, 7, "halves"),
    Version(3, 7, "halves", True),
    Version(4, 7, "lattice"),
    Version(5, 7, "lattice", True),
    Version(6, 10, "lattice"),
)
ONE_WORD = tuple(v for v in VERSIONS if v.one_word)
FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}

# The compiled trial ------------------------------------------------------------------------------


def compiler() -> str:
    """The path of the C++ compiler; empty where there is none."""
    names = (os.environ.get("CXX"), "c++", "g++")
    return next((found for name in names if name and (found := shutil.which(name))), "")


@functools.cache
def library(isa: str) -> ctypes.CDLL:
    """The trial compiled for an instruction set, with the flags of the package's own kernels."""
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder, f"stream_2_{isa}.so"))
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=off", *FLAGS[isa]]
        includes = ["-I", str(HERE.parent / "csrc")]
        source = str(HERE / "stream_2.cpp")
        run(compiler(), *flags, *includes, "-shared", "-fPIC", source, "-o", made)
        found = ctypes.CDLL(made)
    for function in ("trial_sample", "trial_update", "trial_pairs", "trial_add_words"):
        getattr(found, function).restype = ctypes.c_bool
    return found


def _address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _windows(tensor: Tensor) -> ctypes.c_int64:
    assert tensor.numel() % WINDOW == 0, f"got {tensor.numel()} elements, not whole windows"
    return ctypes.c_int64(tensor.numel() // WINDOW)


def _done(fine: bool, version: Version) -> None:
    if not fine:
        raise RuntimeError(f"stream_2.cpp has no such call for {version.name}")


def sample(
    out: Tensor, version: Version, isa: str, *, key: int, direction: int, parameter: int = 0
) -> Tensor:
    """Fills float32 `out`, whole windows of a parameter from its first element on, with z."""
    assert out.dtype == torch.float32
    where = (ctypes.c_uint64(key), ctypes.c_uint32(parameter), _windows(out))
    fine = library(isa).trial_sample(
        version.number, *where, ctypes.c_uint32(direction), _address(out)
    )
    _done(fine, version)
    return out


def updater(
    weights: Tensor,
    version: Version,
    isa: str,
    *,
    key: int,
    directions: list[int],
    first: list[float],
    second: list[float],
    restore: float,
    minus_lr: float,
    decay: float = 1.0,
    eps: float = 1e-8,
    parameter: int = 0,
) -> Callable[[], None]:
    """A call that restores and updates bfloat16 weights along these directions."""
    assert weights.dtype == torch.bfloat16
    count = len(directions)
    arrays = (
        (ctypes.c_uint32 * count)(*directions),
        ctypes.c_int64(count),
        (ctypes.c_float * count)(*first),
        (ctypes.c_float * count)(*second),
    )
    where = (ctypes.c_uint64(key), ctypes.c_uint32(parameter), _windows(weights))
    scalars = map(ctypes.c_float, (restore, minus_lr, decay, eps))
    arguments = (version.number, *where, *arrays, *scalars, _address(weights))
    call = library(isa).trial_update
    return lambda: _done(call(*arguments), version)


def pairs(version: Version, isa: str, first: int, count: int) -> tuple[Tensor, Tensor]:
    """z0 and z1 of `count` words from `first` on, for a version of one word."""
    z0, z1 = torch.empty(2, count)
    words = (ctypes.c_uint32(first), ctypes.c_int64(count))
    fine = library(isa).trial_pairs(version.number, *words, _address(z0), _address(z1))
    _done(fine, version)
    return z0, z1


# The distribution --------------------------------------------------------------------------------

MEANS = {
    **{f"moment {k}": {2: 1.0, 4: 3.0, 6: 15.0}.get(k, 0.0) for k in range(1, 7)},
    **{"z0 z1": 0.0, "z0^2 z1^2": 1.0, "z0^3 z1": 0.0, "z0^4 z1^2": 3.0},
}
"""The means that are measured, and what they are of independent normals."""
BINS = 4096  # of 2^-8, from -8 on
TAILS = (3.0, 4.0, 4.5, 5.0, 5.5)


@dataclass
class Sums:
    """What normals add up to: see stream_2.cpp."""

    normals: int
    sums: Tensor
    bins: Tensor
    seen: Tensor | None = None

    @staticmethod
    def empty() -> Sums:
        return Sums(0, torch.zeros(1 + len(MEANS), dtype=torch.float64), torch.zeros(BINS).long())

    def measures(self) -> dict[str, float]:
        """How far means are from a normal's, in multiples of what is not 0; the distance of the
        distribution function at the bins' edges; and the part beyond each tail on both sides, in
        multiples of a normal's and less 1."""
        found = {"largest": float(self.sums[0])}
        for (name, mean), total in zip(MEANS.items(), self.sums[1:], strict=True):
            found[name] = (float(total) / self.normals - mean) / (mean or 1.0)
        edges = torch.arange(BINS + 1, dtype=torch.float64) / 256 - 8
        below = torch.cat([torch.zeros(1), self.bins.cumsum(0) / self.normals]).double()
        found["distance"] = float((below - torch.special.ndtr(edges)).abs().max())
        for limit in TAILS:
            inner = self.bins[int((8 - limit) * 256) : int((8 + limit) * 256)].sum()
            part = 1 - float(inner) / self.normals
            found[f"beyond {limit:g}"] = part / math.erfc(limit / math.sqrt(2)) - 1
        if self.seen is not None:
            # Of |z|: with the signs, twice as many values.
            found["distinct values"] = 2.0 * int(_bits_set(self.seen))
        return found


def _bits_set(words: Tensor) -> int:
    octets = words.view(torch.uint8)
    table = torch.tensor([bin(n).count("1") for n in range(256)])
    counts = torch.zeros(256, dtype=torch.int64)
    for piece in octets.split(2**24):
        counts += torch.bincount(piece.int(), minlength=256)
    return int((counts * table).sum())


def of_all_words(version: Version, isa: str, log2_words: int = 32, distinct: bool = True) -> Sums:
    """What all words, or 2^log2_words evenly spaced pieces of them, add up to, for a version of one
    word. z1 has the distribution of z0: the angle's reflection swaps them."""
    found = Sums.empty()
    if distinct:
        found.seen = torch.zeros(2**25, dtype=torch.int64)  # a bit for each float32 in [0, 8)
    seen = ctypes.c_void_p(0) if found.seen is None else _address(found.seen)
    piece, pieces = 2**16, 2 ** (log2_words - 16)
    for n in range(pieces):
        words = (ctypes.c_uint32(n * (2**32 // pieces)), ctypes.c_int64(piece))
        sums = (_address(found.sums), _address(found.bins), seen)
        _done(library(isa).trial_add_words(version.number, *words, *sums), version)
        found.normals += piece
    return found


def of_samples(version: Version, isa: str, log2_normals: int = 32) -> Sums:
    """What the pairs of normals of one direction add up to."""
    found = Sums.empty()
    piece = min(2**24, 2**log2_normals)
    out = torch.empty(piece)
    for parameter in range(2**log2_normals // piece):
        sample(out, version, isa, key=0x5EED, direction=1, parameter=parameter)
        z0, z1 = (z.contiguous() for z in out.view(-1, 2).unbind(1))
        sums = (_address(found.sums), _address(found.bins))
        library(isa).trial_add(ctypes.c_int64(piece // 2), _address(z0), _address(z1), *sums)
        found.normals += piece // 2
    return found


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
    """Of the CUDA kernel for an update of bfloat16 weights, for each normal of its loop."""
    bodies = [
        f"Instance<Update<TrialNormals<trial::Stream<{v.rounds}, trial::Form::{form}, "
        f"{str(v.short).lower()}>>, true, Rounding::kNearest>, bfloat16>"
        for v in VERSIONS
        for form in [{"two words": "kWords", "halves": "kHalves", "lattice": "kLattice"}[v.form]]
    ]
    source = str(HERE / "stream_2.cuh")
    compiled = compiled_by_nvcc("sm_90", bodies, includes=[source])
    for version, (registers, spilled, code) in zip(VERSIONS, compiled, strict=True):
        _, loop = loop_sizes(code, whole_program=False)
        columns = settings(what="update", by="CUDA", type="bfloat16", target="sm_90")
        numbers = {"instructions a normal": loop / 16, "registers": registers, "spilled": spilled}
        for metric, value in numbers.items():
            unit = "B" if metric == "spilled" else "1"
            yield Row("stream 2", metric, unit, version.name, columns, median=value, **where)
        print(f"{version.name}: {loop / 16:.2f} a normal, {registers} registers", flush=True)


def compiler_version(path: str) -> str:
    """The last of the compiler's own names for itself, such as `GNU 12.2.0`."""
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
