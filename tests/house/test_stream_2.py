"""The trial of a second stream (docs/stream_2.md): its bits, its normals, its measurements.

What it measures means something only if its version 1 is the package's, its variants are what the
page says, and their normals pass the tests that version 1 passes.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

from adamezo_kernels.backends import native, reference
from benchmarks import stream_2
from benchmarks.library_calls import coefficients
from benchmarks.stream_2 import ONE_WORD, VERSIONS, WINDOW, Version
from helpers.normals import (
    LAGS,
    check_kolmogorov_smirnov,
    check_moments,
    check_tails,
    check_uncorrelated,
)

pytestmark = pytest.mark.skipif(
    not stream_2.compiler(), reason="no C++ compiler: install one, or set CXX"
)
ISAS = native.instruction_sets() or ("portable",)
WHERE = {"key": 0xFEEDFACECAFEBEEF, "direction": 5, "parameter": 1}
by_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda v: v.name)
by_one_word = pytest.mark.parametrize("version", ONE_WORD, ids=lambda v: v.name)


def words_of(version: Version, size: int) -> torch.Tensor:
    """The call's words of every four elements, as rows of four."""
    calls = torch.arange(size // (8 if version.one_word else 4))
    counter = (calls, torch.zeros_like(calls), WHERE["direction"], WHERE["parameter"])
    words = reference.philox4x32(*counter, WHERE["key"], version.rounds)
    return torch.stack([torch.as_tensor(word).expand_as(calls) for word in words], 1)


def textbook(x: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair that a word stands for, in float64."""
    if form == "halves":
        u = ((x >> 16 & 0x7FFF).double() + 0.5) / 2**15
        f = ((x >> 1 & 0x7FFF).double() + 0.5) / 2**14 - 1
        second = x & 1
    else:
        y = x * stream_2.GOLDEN & 0xFFFFFFFF
        u = ((x & 0x7FFFFFFE) | 1).float().double() / 2**31
        f = (y & 0x7FFFFF).double() / 2**22 - 1
        second = y >> 31
    r, angle = (-u.log()).sqrt(), f * (math.pi / 4)
    z0, z1 = r * (angle.sin() + angle.cos()), r * (angle.cos() - angle.sin())
    return z0 * (1 - 2 * (x >> 31)), z1 * (1 - 2 * second)


def bound(version: Version) -> float:
    """How far a normal may be from float64's.

    2.0e-6 with version 1's polynomials, whose sum of errors tests/contract/test_directions.py has.
    The short logarithm is within 8.9e-6 (relative), which is half of that in r and 3.0e-5 in
    |z| <= 6.56; sine and cosine are within 5.7e-7 and 1.23e-5, together 6.0e-5 at r <= 4.64.
    """
    return 2.0e-6 + (3.0e-5 + 6.0e-5) * version.short


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("version", VERSIONS[:2], ids=lambda v: v.name)
def test_two_words_are_the_normals_of_the_reference(version, isa):
    got = stream_2.sample(torch.empty(3 * WINDOW), version, isa, **WHERE)
    x = words_of(version, 3 * WINDOW)
    fours = [z for i in (0, 2) for z in reference.exact_normals(x[:, i], x[:, i + 1])]
    assert torch.equal(got, torch.stack(fours, 1).flatten())


@pytest.mark.parametrize("isa", ISAS)
@by_one_word
def test_one_word_is_a_pair_of_the_textbook(version, isa):
    """And a call serves the same four elements of both halves of a window."""
    windows = 3
    got = stream_2.sample(torch.empty(windows * WINDOW), version, isa, **WHERE)
    got = got.view(windows, 2, WINDOW // 8, 4)
    words = words_of(version, windows * WINDOW).view(windows, WINDOW // 8, 2, 2)
    z0, z1 = textbook(words, version.form)
    expected = torch.stack([z0, z1], -1).flatten(3).movedim(2, 1)
    assert (got - expected).abs().max() < bound(version)


@by_one_word
def test_any_word_is_a_pair_of_the_textbook(version):
    """The smallest u among them, where z is largest and so are its errors; and u near 1."""
    for first in (0, 2**31 - 2**12, 2**31, 2**32 - 2**12, 0x12345600):
        x = torch.arange(first, first + 2**12)
        for got, expected in zip(
            stream_2.pairs(version, ISAS[0], first, 2**12), textbook(x, version.form), strict=True
        ):
            assert (got - expected).abs().max() < bound(version)
            # sqrt(-2 ln u) of the smallest u, which is 2^-16 of halves, and else 2^-31.
            largest = math.sqrt(2 * math.log(2) * (16 if version.form == "halves" else 31))
            assert got.abs().max() < largest + bound(version)


@by_version
def test_all_instruction_sets_have_the_same_bits(version):
    drawn = [stream_2.sample(torch.empty(WINDOW), version, isa, **WHERE) for isa in ISAS]
    drawn.append(stream_2.sample(torch.empty(WINDOW), version, "portable", **WHERE))
    assert all(torch.equal(z, drawn[0]) for z in drawn)
    updated = []
    for isa in (*ISAS, "portable"):
        updated.append(stream_2.tensor_for("update", WINDOW))
        stream_2.tried("update", version, isa, updated[-1])()
    assert all(torch.equal(w, updated[0]) for w in updated)


@pytest.mark.skipif(not native.instruction_sets(), reason="the compiled module is not here")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("what", ["sample", "update"])
def test_version_1_of_the_trial_is_the_packages(what, isa):
    stream_2.gate(what, isa)


@by_version
def test_an_update_goes_along_the_directions_that_are_sampled(version):
    horizon, restore, minus_lr, decay = 10, 1e-2, -1e-2, 0.999
    first, second = coefficients([0.5 * (-1) ** age for age in range(horizon)], (0.7, 0.9))
    directions = list(range(horizon, 0, -1))
    weights = stream_2.tensor_for("update", 2 * WINDOW)
    theta = weights.double()
    z = [
        stream_2.sample(torch.empty(2 * WINDOW), version, ISAS[0], key=3, direction=d).double()
        for d in directions
    ]
    m = sum(c * x for c, x in zip(first, z, strict=True))
    v = sum(c * x * x for c, x in zip(second, z, strict=True))
    expected = (theta + restore * z[0]) * decay + minus_lr * m / (v.sqrt() + 1e-8)
    stream_2.updater(
        *(weights, version, ISAS[0]),
        **dict(key=3, directions=directions, first=first, second=second),
        **dict(restore=restore, minus_lr=minus_lr, decay=decay),
    )()
    # Half a unit in the last place of bfloat16, and of float32 sums of ten terms below 4, times lr.
    tolerance = expected.abs() * 2**-8 + 1e-2 * 10 * 2**-22
    assert ((weights - expected).abs() <= tolerance).all()


# --- distribution: what version 1 is held to in tests/contract/test_directions.py ---------------


@functools.cache
def many(version: Version) -> torch.Tensor:
    size = 2**24 if ISAS[0] != "portable" else 2**20
    return stream_2.sample(torch.empty(size), version, ISAS[0], **WHERE)


@pytest.mark.parametrize("check", [check_moments, check_kolmogorov_smirnov, check_tails])
@by_version
def test_normals_are_distributed_as_version_1_has_to_be(version, check):
    check(many(version))


@pytest.mark.parametrize("lag", [*LAGS, WINDOW // 2])  # and that of a call's two fours
@by_version
def test_no_correlation_at_a_lag_of_the_trial(version, lag):
    check_uncorrelated(many(version)[:-lag], many(version)[lag:])


@pytest.mark.parametrize(
    "other",
    [{"direction": 6}, {"parameter": 2}, {"key": 0xFEEDFACECAFEBEEE}],
    ids=lambda other: next(iter(other)),
)
@by_version
def test_neighbouring_streams_of_the_trial_are_independent(version, other):
    n = many(version).numel() // 4
    z = stream_2.sample(torch.empty(n), version, ISAS[0], **WHERE | other)
    assert not torch.equal(many(version)[:n], z)
    check_uncorrelated(many(version)[:n], z)


# --- what is measured of all words ---------------------------------------------------------------


@by_one_word
def test_sums_over_words_are_those_of_their_pairs(version):
    """Over pieces of words as the benchmark takes them."""
    found = stream_2.of_all_words(version, ISAS[0], log2_words=18)
    pieces = [stream_2.pairs(version, ISAS[0], n * 2**30, 2**16) for n in range(4)]
    z0, z1 = (torch.cat(z).double() for z in zip(*pieces, strict=True))
    measured = found.measures()
    assert found.normals == z0.numel() == 2**18
    for name, terms in {
        **{f"moment {k}": z0**k for k in range(1, 7)},
        **{"z0 z1": z0 * z1, "z0^2 z1^2": z0**2 * z1**2},
        **{"z0^3 z1": z0**3 * z1, "z0^4 z1^2": z0**4 * z1**2},
    }.items():
        mean = stream_2.MEANS[name]
        off = (terms.mean() - mean) / (mean or 1.0)
        # Two orders of a sum of 2^18 numbers in float64.
        assert abs(measured[name] - off) <= 2**18 * 2**-52 * terms.abs().mean(), name
    assert measured["largest"] == torch.maximum(z0.abs(), z1.abs()).max()
    assert measured["distinct values"] == 2 * z0.abs().unique().numel()
    beyond = (z0.abs() > 3).double().mean().item() / math.erfc(3 / math.sqrt(2))
    assert measured["beyond 3"] == pytest.approx(beyond - 1, abs=1e-9)
    edges = torch.arange(-8, 8, 2**-8, dtype=torch.float64)
    below = torch.searchsorted(z0.sort().values, edges) / z0.numel()
    expected = (below - torch.special.ndtr(edges)).abs().max()
    assert measured["distance"] == pytest.approx(expected.item(), abs=1e-9)


def test_what_was_not_compiled_is_refused():
    with pytest.raises(RuntimeError, match="no such call for version 1"):
        stream_2.pairs(VERSIONS[0], ISAS[0], 0, 64)
