"""Quotients and roots that the CUDA kernels make without a test of each are correctly rounded,
whatever a GPU's approximations are within NVIDIA's bounds for them. Where the steps do not hold is
in test_cuda_bodies.py."""

from __future__ import annotations

import itertools

import numpy

from adamezo_kernels.backends import native
from helpers.backends import needs_native

pytestmark = needs_native


def address(array: numpy.ndarray) -> int:
    assert array.dtype == numpy.float32
    assert array.flags.c_contiguous
    return array.ctypes.data


def quotients(a: numpy.ndarray, b: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    out = numpy.empty_like(a)
    native.compiled.cuda_quotients_on_host(*map(address, (a, b, y, out)), len(a))
    return out


def roots(a: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    out = numpy.empty_like(a)
    native.compiled.cuda_roots_on_host(*map(address, (a, y, out)), len(a))
    return out


def moved(y: numpy.ndarray, by: int) -> numpy.ndarray:
    """The float32 that many places above positive ones."""
    return (y.view(numpy.int32) + numpy.int32(by)).view(numpy.float32)


def hardest_quotients(count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Integers a and b below 2^24 with a quotient as near as can be to the middle between two
    float32: 2^n a = (2 m + 1) b + 1 or - 1, where m has 24 bits."""
    random = numpy.random.default_rng(7)
    b = random.integers(2**22, 2**23, count, dtype=numpy.uint64) * 2 + 1
    b[:64] = 2**24 - 1 - 2 * numpy.arange(64)  # where the reciprocal is the least exact
    inverse = b.copy()
    for _ in range(5):  # each doubles the bits, of which there are 3 to begin with
        inverse *= 2 - b * inverse
    found = []
    for n, sign in itertools.product((24, 25), (1, -1)):
        middle = (inverse if sign == -1 else 0 - inverse) % 2**n
        for odd in (middle, middle + 2**24) if n == 24 else (middle,):
            a, left = numpy.divmod(odd * b + sign % 2**64, 2**n)
            good = (left == 0) & (a >= 2**23) & (a < 2**24) & (odd >= 2**24) & (odd < 2**25)
            found.append((a[good], b[good]))
    a, b = map(numpy.concatenate, zip(*found, strict=True))
    return a.astype(numpy.float32), b.astype(numpy.float32)


def test_quotients_are_correctly_rounded():
    """From every reciprocal with an error of less than one place, NVIDIA's bound, by a theorem of
    Markstein; but for a denominator of 24 ones, of which it has to be the nearest one. nvcc's
    quotients need that too."""
    a, b = hardest_quotients(100_000)
    assert len(a) > 100_000
    random = numpy.random.default_rng(8)
    more = random.integers(2**23, 2**24, (2, 300_000)).astype(numpy.float32)
    a, b = numpy.append(a, more[0]), numpy.append(b, more[1])
    # At all ends of what the kernels take, and in the middle.
    for of_b, of_quotient in itertools.product((-51, 0, 64), (-40, 0, 58)):
        divided = numpy.ldexp(a, of_b + of_quotient - 22)
        by = numpy.ldexp(b, of_b - 23)
        right = divided / by
        assert numpy.abs(right).min() >= 2.0**of_quotient
        exact = 1 / by.astype(numpy.float64)
        nearest = exact.astype(numpy.float32)
        for error in (-1, 0, 1):
            y = moved(nearest, error)
            allowed = numpy.abs(y - exact) < numpy.spacing(nearest)
            assert allowed.mean() > 0.4
            allowed &= (b < 2**24 - 1) | (error == 0)
            got = quotients(divided, by, y)
            assert (got == right)[allowed].all(), (of_b, of_quotient, error)
            assert (quotients(-divided, by, y) == -got)[allowed].all()


def test_quotients_by_ones_are_correctly_rounded():
    a = numpy.arange(2**23, 2**24, dtype=numpy.float32)
    b = numpy.full_like(a, 2**24 - 1)
    assert (quotients(a, b, 1 / b) == a / b).all()


def test_roots_are_correctly_rounded():
    """Of all float32 in [1, 4), of which others are multiples by a power of 4, and at both ends;
    but for two, whose reciprocal root must not be above the nearest one. nvcc's need that too."""
    two = {0x3FFC114A, 0x406E9372}
    every = numpy.arange(0x3F800000, 0x40800000, dtype=numpy.int32).view(numpy.float32)
    for exponent in (0, -101 + 1, 126):
        some = every if exponent == 0 else every[::31]
        a = numpy.ldexp(some, exponent)
        right = numpy.sqrt(a)
        exact = 1 / numpy.sqrt(a.astype(numpy.float64))
        nearest = exact.astype(numpy.float32)
        for error in (-2, -1, 0, 1, 2):
            y = moved(nearest, error)
            allowed = numpy.abs(y / exact - 1) <= 2.0**-22.9  # NVIDIA's bound
            assert allowed.any()
            wrong = some[(roots(a, y) != right) & allowed].view(numpy.int32)
            assert set(wrong.tolist()) <= (two if error == 1 else set()), (exponent, error)
