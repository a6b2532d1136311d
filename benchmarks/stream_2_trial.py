"""The trial of a second stream: its versions, its compiled loops, what its normals add up to.

stream_2.py measures them. docs/stream_2.md says what they are.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.sass import run

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
        # A round multiplies, shifts and combines two words of two halves of the blocks. Of the
        # first three, what no stream shares is left, and four shuffles merge the halves.
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


def of_all_words(version: Version, isa: str, log2_words: int = 32) -> Sums:
    """What all words add up to, for a version of one word, or 2^log2_words of them in pieces of
    2^16 that are evenly spaced. z1 has the distribution of z0, whose angle is reflected."""
    found = Sums.empty()
    found.seen = torch.zeros(2**25, dtype=torch.int64)  # a bit for each float32 in [0, 8)
    piece, pieces = 2**16, 2 ** (log2_words - 16)
    for n in range(pieces):
        words = (ctypes.c_uint32(n * (2**32 // pieces)), ctypes.c_int64(piece))
        sums = (_address(found.sums), _address(found.bins), _address(found.seen))
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
