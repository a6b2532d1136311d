"""The random direction: Philox, the exact normals, and that every backend gives the same bits."""

from __future__ import annotations

import functools
import itertools
import math
import random
import struct
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from adamezo_kernels import PhiloxState, sample_
from adamezo_kernels.backends import reference
from helpers.backends import BACKENDS, INSTRUCTION_SETS, needs_native
from helpers.normals import (
    LAGS,
    check_kolmogorov_smirnov,
    check_moments,
    check_tails,
    check_uncorrelated,
)

KEYS = (0, 0x0123456789ABCDEF, 2**64 - 1)
SIZES = (0, 1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 4097)
# A block is 4 elements, so the low word of the block index wraps at element 2**34; one of
# `rademacher` is 128, so that it wraps at 2**39.
OFFSETS = (0, 1, 2, 3, 2**31 - 2, 2**32 + 3, 2**34 - 7, 2**34 + 5, 2**39 - 131, 2**62 + 2)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


# --- Philox -----------------------------------------------------------------------------------


def known_answers():
    for line in (Path(__file__).parent / "data" / "philox4x32_kat.txt").read_text().splitlines():
        if not line.startswith("#"):
            rounds, *words = line.split()
            words = [int(word, 16) for word in words]
            yield int(rounds), words[:4], words[4] | words[5] << 32, words[6:]


def philox_ints(counter, key, rounds):
    return list(reference.philox4x32(*counter, key, rounds))


def philox_tensors(counter, key, rounds):
    counter = [torch.tensor([word]) for word in counter]
    return [int(word) for word in reference.philox4x32(*counter, key, rounds)]


def philox_native(counter, key, rounds):
    from adamezo_kernels import _native

    return list(_native.philox(counter, key, rounds))


@pytest.mark.parametrize(
    "philox",
    [
        philox_ints,
        philox_tensors,
        pytest.param(philox_native, marks=needs_native),
    ],
)
def test_philox_known_answers(philox):
    answers = list(known_answers())
    assert {rounds for rounds, *_ in answers} == {7, 10}
    for rounds, counter, key, expected in answers:
        assert philox(counter, key, rounds) == expected


# --- fused multiply-add -----------------------------------------------------------------------


def round_to_float32(x: Fraction) -> float:
    """The nearest float32 to a rational number, ties to even, in integer arithmetic alone."""
    if x == 0:
        return 0.0
    magnitude = abs(x)
    # exponent: 2**exponent <= magnitude < 2**(exponent + 1)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / ulp) * ulp  # round() of a Fraction takes ties to even
    value = math.inf if rounded >= Fraction(2) ** 128 else float(rounded)
    return -value if x < 0 else value


def exact_fma(a: float, b: float, c: float) -> float:
    return round_to_float32(Fraction(a) * Fraction(b) + Fraction(c))


def float32_from_bits(pattern: int) -> float:
    return struct.unpack("<f", struct.pack("<I", pattern))[0]


def half_way_cases(rng):
    """a*b + c just beside a point half-way between two float32, closer than float64 can tell.

    With a = 1 + 2**-23 and b = 1 -+ 2**-23 the product is 1 -+ tiny. Scaled to half an ulp of c it
    puts the sum within 2**-46 of half an ulp of the half-way point; float64 rounds it onto that.
    """
    for _ in range(500):
        odd = rng.randrange(2**23, 2**24)
        exponent = rng.randrange(-60, 60)
        c = math.ldexp(odd, exponent - 23) * rng.choice((1, -1))
        half_ulp = math.ldexp(1.0, exponent - 24) * rng.choice((1, -1))
        yield (1 + 2**-23) * half_ulp, 1 - 2**-23, c
        yield (1 - 2**-23) * half_ulp, 1 - 2**-23, c
        yield (1 + 2**-23) * half_ulp, 1 + 2**-23, c
        yield half_ulp, 1.0, c  # truly half-way: to even


def subnormal_cases(rng):
    """Results under 2**-126, where float32 has fewer bits than the usual 24."""
    for _ in range(500):
        a = math.ldexp(rng.randrange(2**23, 2**24), -23)
        b = math.ldexp(rng.randrange(2**23, 2**24), -23 - rng.randrange(124, 152))
        c = float32_from_bits(rng.randrange(2**23)) * rng.choice((1, -1))
        yield a, round_to_float32(Fraction(b)), c
        # Half a unit of 2**-149, give or take less than float64 can hold beside c.
        k = rng.randrange(1, 2**22) * 2.0**-149
        yield math.ldexp(1 + 2**-23, -75), math.ldexp(1 - 2**-23, -75), k
        yield math.ldexp(1 + 2**-23, -75), math.ldexp(-1 + 2**-23, -75), k
        yield math.ldexp(1 + 2**-23, -75), math.ldexp(1 + 2**-23, -75), k


def random_cases(rng):
    for _ in range(4000):
        a, b, c = (float32_from_bits(rng.randrange(2**32)) for _ in range(3))
        if all(map(math.isfinite, (a, b, c))):
            yield a, b, c
    for _ in range(2000):
        a, b, c = (round_to_float32(Fraction(rng.gauss(0, 1))) for _ in range(3))
        yield a, b, c
        yield a, b, round_to_float32(-Fraction(a) * Fraction(b))  # cancels
    top = float32_from_bits(0x7F7FFFFF)
    half_ulp = 2.0**103
    yield from ((half_ulp, 1.0, top), ((1 - 2**-24) * half_ulp, 1.0, top), (top, top, -top))


@pytest.mark.parametrize("cases", [half_way_cases, subnormal_cases, random_cases])
def test_fma_is_exact(cases):
    triples = list(cases(random.Random(20)))
    a, b, c = torch.tensor(triples, dtype=torch.float64).unbind(1)
    for x in (a, b, c):
        assert torch.equal(x.float().double(), x), "a case is not float32"
    got = reference.fma(a.float(), b.float(), c.float())
    expected = torch.tensor([exact_fma(*triple) for triple in triples], dtype=torch.float64)
    assert torch.equal(got.double(), expected)
    # What a plain sum in float64 gives: the cases are worth having only if that is wrong on some.
    if cases is not random_cases:
        assert not torch.equal((a * b + c).float().double(), expected)


def test_fma_of_special_values_and_scalars():
    inf, nan = math.inf, math.nan
    one = torch.ones(1)
    assert reference.fma(one, inf, 1.0).item() == inf
    assert reference.fma(one, -inf, 1.0).item() == -inf
    for got in (reference.fma(one, inf, -inf), reference.fma(one * nan, 1.0, 1.0)):
        assert got.isnan().all()
    # Signed zeros as IEEE 754 has them: -0 + -0 = -0, x - x = +0.
    assert math.copysign(1, reference.fma(-0.0 * one, 1.0, -0.0).item()) == -1
    assert math.copysign(1, reference.fma(one, 1.0, -1.0).item()) == 1
    matrix = torch.randn(3, 1, generator=torch.Generator().manual_seed(0))
    row = torch.randn(5, generator=torch.Generator().manual_seed(1))
    assert reference.fma(matrix, 2.0, row).shape == (3, 5)


# --- exact normals ----------------------------------------------------------------------------


def test_minus_log_is_within_its_bound():
    """9.0e-8 relative: 2**21 floats spread evenly over the bit patterns of [2**-31, 1], both ends
    and the seams between two binades of the argument reduction."""
    first, last = 0x30000000, 0x3F800000
    stride = (last - first) // 2**21
    seams = 0x3F2AAAAB - torch.arange(0, 32) * 2**23
    seams = (seams[:, None] + torch.arange(-4, 5)).flatten()
    patterns = torch.cat(
        [
            torch.arange(first, last + 1, stride),
            torch.arange(last - 4096, last + 1),
            seams[(seams >= first) & (seams <= last)],
        ]
    )
    u = patterns.to(torch.int32).view(torch.float32)
    got, expected = reference.minus_log(u).double(), -u.double().log()
    assert got[u == 1].eq(0).all()
    apart = u != 1
    assert ((got - expected).abs()[apart] / expected[apart]).max() < 9.0e-8


def test_sine_and_cosine_are_within_their_bound():
    """8.3e-8 absolute over every eighth value that the 23 bits of the angle can take."""
    f = (torch.arange(0, 2**23 + 1, 8).double() * 2.0**-22 - 1).float()
    sine, cosine = reference.sin_cos_eighth_turn(f)
    angle = f.double() * (math.pi / 4)
    assert (sine.double() - angle.sin()).abs().max() < 8.3e-8
    assert (cosine.double() - angle.cos()).abs().max() < 8.3e-8


def box_muller(x0: torch.Tensor, x1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook formula in float64 on the uniform and the angle that the words stand for."""
    u = (((x0 & 0x7FFFFFFE) | 1).float() * 2.0**-31).double()
    eighths = (x1 & 0x007FFFFF).double() * 2.0**-22  # in [0, 2): the angle from 0 to a quarter turn
    radius = (-2 * u.log()).sqrt()
    angle = eighths * (math.pi / 4)
    signs = [1 - 2 * (x >> 31) for x in (x0, x1)]
    return radius * angle.sin() * signs[0], radius * angle.cos() * signs[1]


@pytest.mark.parametrize(("tails", "bound"), [(False, 8.6e-7), (True, 2.0e-6)])
def test_normals_are_box_muller_of_the_words(tails, bound):
    """8.6e-7 is what the definition of the stream states for words as they come, a measured figure.

    2.0e-6 holds for any words, the rare ones far out among them, and is the sum of the parts: with
    r <= 4.64 and |z| <= 6.56, the root is off by 9.0e-8 / 2 and a rounding (together 1.05e-7 of
    |z|: 6.9e-7), sine and cosine by 8.3e-8 each (of r: 7.7e-7), r C and z by half an ulp each
    (2**-22, twice: 4.8e-7).
    """
    generator = torch.Generator().manual_seed(3)
    x0, x1 = torch.randint(2**32, (2, 2**20), generator=generator)
    if tails:  # small u, where z is largest and so are its errors
        x0 >>= torch.randint(1, 31, x0.shape, generator=generator)
        x0[:4] = torch.tensor([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    for got, expected in zip(reference.exact_normals(x0, x1), box_muller(x0, x1), strict=True):
        assert (got.double() - expected).abs().max() < bound


def transcribed_normal(words: list[int], output: int) -> float:
    """One exact normal in rational arithmetic with a rounding after each operation: the
    definition of the stream once more, sharing nothing with the backends."""
    x0, x1 = (words[0], words[1]) if output < 2 else (words[2], words[3])

    def rounded_sqrt(x: Fraction) -> Fraction:
        # Enough bits of the integer root, and a sticky one, that rounding it is rounding the root.
        scaled = x * 2**200
        root = math.isqrt(scaled.numerator // scaled.denominator)
        sticky = root * root != scaled
        return Fraction(round_to_float32((Fraction(root) + Fraction(sticky, 2)) / 2**100))

    def fma(a, b, c):
        return Fraction(exact_fma(a, b, c))

    def constant(x: float) -> Fraction:
        return Fraction(struct.unpack("<f", struct.pack("<f", x))[0])

    def horner(x, coefficients):
        total = constant(coefficients[0])
        for coefficient in coefficients[1:]:
            total = fma(total, x, constant(coefficient))
        return total

    u = round_to_float32(Fraction((x0 & 0x7FFFFFFE) | 1)) * 2.0**-31
    pattern = struct.unpack("<I", struct.pack("<f", u))[0]
    e = (pattern - 0x3F2AAAAB) & 0xFF800000
    e = e - 2**32 if e >= 2**31 else e
    g = Fraction(float32_from_bits(pattern - e)) - 1
    s = Fraction(round_to_float32(g * g))
    p = horner(
        g,
        (
            -0.14020569622516632,
            0.15383614599704742,
            -0.13997136056423187,
            0.1641702800989151,
            -0.20011073350906372,
            0.250077486038208,
            -0.33333200216293335,
            0.49999937415122986,
        ),
    )
    w = fma(Fraction(e), constant(-8.262958405176314e-08), fma(p, s, -g))
    r = rounded_sqrt(w)
    f = Fraction(float32_from_bits((x1 & 0x007FFFFF) | 0x40000000)) - 3
    s = Fraction(round_to_float32(f * f))
    sine = horner(
        s, (-3.5579418181441724e-05, 0.002489370759576559, -0.08074513077735901, 0.7853981256484985)
    )
    sine = Fraction(round_to_float32(sine * f))
    cosine = horner(s, (-0.00031918685999698937, 0.015850437805056572, -0.3084245026111603, 1.0))
    r_cosine = Fraction(round_to_float32(r * cosine))
    z = fma(r if output % 2 == 0 else -r, sine, r_cosine)
    sign_word = x0 if output % 2 == 0 else x1
    return float(-z if sign_word >> 31 else z)


@pytest.mark.parametrize("offset", [0, 3, 2**34 - 9, 2**62 + 2])
def test_reference_is_the_definition_element_by_element(offset):
    key, direction, parameter = 0x9E3779B97F4A7C15, 0x80000001, 0xABCDEF
    got = reference.exact_direction(
        offset, 0, 1, 50, key=key, direction=direction, parameter=parameter
    )
    expected = []
    for index in range(offset, offset + 50):
        block = index // 4
        counter = (block % 2**32, block >> 32, direction, parameter)
        words = reference.philox4x32(*counter, key)
        expected.append(transcribed_normal(list(words), index % 4))
    assert torch.equal(got[0].double(), torch.tensor(expected, dtype=torch.float64))


# --- the same bits everywhere -----------------------------------------------------------------


def draw(
    size,
    backend,
    *,
    key=1,
    direction=2,
    parameter=3,
    offset=0,
    dtype=torch.float32,
    distribution="exact",
):
    out = torch.full((size,), math.nan, dtype=dtype)
    state = PhiloxState(key, direction, offset)
    return sample_(out, state, parameter=parameter, distribution=distribution, backend=backend)


OF_THE_REFERENCE = {
    "exact": reference.exact_direction,
    "rademacher": reference.rademacher_direction,
}


@pytest.mark.parametrize("distribution", OF_THE_REFERENCE)
@pytest.mark.parametrize("offset", OFFSETS)
def test_native_gives_the_bits_of_the_reference(isa, guarded, offset, distribution):
    for number, size in enumerate(SIZES):
        key, direction = KEYS[number % 3], (0, 1, 2**32 - 1)[number % 3]
        for parameter in (0, 2**24 - 1):
            expected = OF_THE_REFERENCE[distribution](
                offset, 0, 1, size, key=key, direction=direction, parameter=parameter
            )
            out = guarded(size, torch.float32, offset=number % 7)
            sample_(
                out,
                PhiloxState(key, direction, offset),
                parameter=parameter,
                distribution=distribution,
                backend="native",
            )
            assert torch.equal(bits(out), bits(expected[0])), (size, parameter)


@functools.cache
def long_draw(distribution):
    return draw(2**21, "reference", offset=2**34 - 2**20 - 1, distribution=distribution)


@pytest.mark.parametrize("distribution", OF_THE_REFERENCE)
def test_native_gives_the_bits_of_the_reference_on_a_long_tensor(isa, distribution):
    """2**21 elements: enough to meet rare words, and several threads' and chunks' seams."""
    torch.set_num_threads(2)
    got = draw(2**21, "native", offset=2**34 - 2**20 - 1, distribution=distribution)
    assert torch.equal(bits(got), bits(long_draw(distribution)))


# Bits of stream version 1: eight elements of a direction, by (key, direction, parameter, first
# element). They must never change: saved runs are replayed from these numbers alone.
VERSION_1 = {
    (0, 0, 0, 0): "3f259336 be394852 bc53bf10 bf9cf786 be474c98 3e8d7aae bfb02750 3c8aae4a",
    (
        0x0123456789ABCDEF,
        7,
        11,
        0,
    ): "3f6c1456 bf7a6222 3e2e96de bd99eb15 be9124e6 bf8892a1 bf0d8449 bf91dbac",
    (
        2**64 - 1,
        2**32 - 1,
        2**24 - 1,
        2**34 - 4,
    ): "3f2b00df bef6cf7f 3df8a051 c0177195 bea09f38 bed4dec2 bfd3e452 3ff39d66",
}


@pytest.mark.parametrize("where", VERSION_1)
def test_the_stream_is_version_1(where):
    key, direction, parameter, offset = where
    got = draw(8, "reference", key=key, direction=direction, parameter=parameter, offset=offset)
    patterns = [f"{pattern & 0xFFFFFFFF:08x}" for pattern in bits(got).tolist()]
    assert patterns == VERSION_1[where].split()


@pytest.mark.parametrize(
    ("distribution", "start"), [("exact", 2**34 - 2500), ("rademacher", 2**39 - 2500)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_sampled_in_pieces_is_the_tensor_sampled_whole(backend, distribution, start):
    size = 5000
    whole = draw(size, backend, offset=start, distribution=distribution)
    rng = random.Random(4)
    for cuts in ([1], [2, 3], sorted(rng.sample(range(size), 40))):
        edges = [0, *cuts, size]
        pieces = [
            draw(stop - begin, backend, offset=start + begin, distribution=distribution)
            for begin, stop in itertools.pairwise(edges)
        ]
        assert torch.equal(bits(torch.cat(pieces)), bits(whole))


@pytest.mark.parametrize("of", [*OF_THE_REFERENCE.values(), reference.rounding_words])
@pytest.mark.parametrize("index_stride", [0, 1, 4, 7, 10, 2**33 + 1])
def test_rows_of_the_reference_are_slices_of_the_whole(index_stride, of):
    where = {"key": 5, "direction": 6, "parameter": 7}
    rows = of(9, index_stride, 6, 10, **where)
    for r in range(6):
        assert torch.equal(rows[r], of(9 + r * index_stride, 0, 1, 10, **where)[0])


@pytest.mark.parametrize("offset", [0, 3, 125, 2**34 - 9, 2**39 - 9, 2**62 + 2])
def test_signs_and_rounding_words_are_those_of_their_calls(offset):
    key, direction, parameter = 0x9E3779B97F4A7C15, 0x80000001, 0xABCDEF
    where = {"key": key, "direction": direction, "parameter": parameter}
    signs = reference.rademacher_direction(offset, 0, 1, 300, **where)[0].tolist()
    words = reference.rounding_words(offset, 0, 1, 300, **where)[0].tolist()

    def call(block, purpose):
        last = parameter + purpose * 2**24
        return reference.philox4x32(block % 2**32, block >> 32, direction, last, key)

    for i, index in enumerate(range(offset, offset + 300)):
        word = call(index // 128, 0)[index // 32 % 4]
        assert signs[i] == (-1.0 if word >> index % 32 & 1 else 1.0)
        assert words[i] == call(index // 4, 1)[index % 4]


def test_chunks_of_the_reference_leave_no_seam(monkeypatch):
    whole = draw(1001, "reference")
    monkeypatch.setattr(reference, "CHUNK", 97)
    assert torch.equal(bits(draw(1001, "reference")), bits(whole))


# --- distribution -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """2**24 normals from the compiled kernels, 2**20 where there are none."""
    if INSTRUCTION_SETS:
        return draw(2**24, "native", key=0xFEEDFACECAFEBEEF, direction=5, parameter=1)
    return draw(2**20, "reference", key=0xFEEDFACECAFEBEEF, direction=5, parameter=1)


def test_moments_to_the_sixth(many):
    check_moments(many)


def test_kolmogorov_smirnov(many):
    check_kolmogorov_smirnov(many)


def test_tail_counts(many):
    check_tails(many)
    # No normal can exceed sqrt(62 ln 2) = 6.5555, as the smallest u is 2**-31.
    assert many.abs().max() < 6.556


@pytest.mark.parametrize("lag", LAGS)
def test_no_correlation_at_a_lag(many, lag):
    check_uncorrelated(many[:-lag], many[lag:])


@pytest.mark.parametrize(
    "other",
    [{"direction": 6}, {"parameter": 2}, {"key": 0xFEEDFACECAFEBEEE}, {"offset": 2**34}],
    ids=lambda other: next(iter(other)),
)
def test_neighbouring_streams_are_independent(many, other):
    where = {"key": 0xFEEDFACECAFEBEEF, "direction": 5, "parameter": 1} | other
    n = many.numel() // 4
    z = draw(n, "native" if INSTRUCTION_SETS else "reference", **where)
    assert not torch.equal(many[:n], z)
    check_uncorrelated(many[:n], z)
