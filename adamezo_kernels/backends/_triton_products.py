"""The Triton kernel of products with perturbed weights: y = x (W + c Z)^T, tile by tile.

A program does one tile of y: it goes over a row of tiles of W, adds c times the regenerated Z to
each in registers, rounds it to the type of W as a perturbation would store it, and multiplies.
"""

# mypy: ignore-errors
# (Triton reads annotations as the types of a kernel's arguments.)

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_kernels import (
    _exact,
    _fast,
    _float,
    _group,
    _nearest,
    _sign,
    _words,
    part,
    perturbed,
)


@part
def _call(stream, block):
    """The four words of the calls with these 64-bit block indices."""
    key_low, key_high, direction, parameter = stream
    y0, y1, y2 = _group(key_low, key_high, block.to(tl.uint32), parameter)
    high = (block >> 32).to(tl.uint32)
    return _words(key_low, key_high, y0, y1, y2, high, direction)


@part
def _four(stream, index, DISTRIBUTION: tl.constexpr, ON: tl.constexpr):
    """z at these elements and the three behind each, where all indices are multiples of four."""
    if DISTRIBUTION == "rademacher":
        x0, x1, x2, x3 = _call(stream, index >> 7)
        place = index.to(tl.int32)
        odd = (place & 32) != 0
        word = tl.where((place & 64) != 0, tl.where(odd, x3, x2), tl.where(odd, x1, x0))
        word = word >> (place & 31).to(tl.uint32)
        return _sign(word, 0), _sign(word, 1), _sign(word, 2), _sign(word, 3)
    else:
        x0, x1, x2, x3 = _call(stream, index >> 2)
        z0, z1 = _pair(x0, x1, DISTRIBUTION, ON)
        z2, z3 = _pair(x2, x3, DISTRIBUTION, ON)
        return z0, z1, z2, z3


@part
def _pair(x0, x1, DISTRIBUTION: tl.constexpr, ON: tl.constexpr):
    if DISTRIBUTION == "fast":
        return _fast(x0, x1, ON)
    else:
        return _exact(x0, x1, ON)


@part
def _one(stream, index, DISTRIBUTION: tl.constexpr, ON: tl.constexpr):
    """z at these elements, each from a call of its own."""
    place = index.to(tl.int32)
    if DISTRIBUTION == "rademacher":
        z, _, _, _ = _four(stream, index, DISTRIBUTION, ON)
        return z
    else:
        x0, x1, x2, x3 = _call(stream, index >> 2)
        behind = (place & 2) != 0
        z0, z1 = _pair(tl.where(behind, x2, x0), tl.where(behind, x3, x1), DISTRIBUTION, ON)
        return tl.where((place & 1) != 0, z1, z0)


@part
def _displaced(
    weights, scale, stream, index, DISTRIBUTION: tl.constexpr, TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr, ON: tl.constexpr,
):  # fmt: skip
    """W + c Z of a tile of W in float32, rounded to its type; `index` is that of every fourth."""
    even, odd = tl.split(tl.reshape(_wide(weights, TYPE), [OUT, INNER // 4, 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if ALIGNED:
        z0, z1, z2, z3 = _four(stream, index, DISTRIBUTION, ON)
    else:
        z0 = _one(stream, index, DISTRIBUTION, ON)
        z1 = _one(stream, index + 1, DISTRIBUTION, ON)
        z2 = _one(stream, index + 2, DISTRIBUTION, ON)
        z3 = _one(stream, index + 3, DISTRIBUTION, ON)
    w0 = _nearest(perturbed(w0, z0, scale), TYPE, ON)
    w1 = _nearest(perturbed(w1, z1, scale), TYPE, ON)
    w2 = _nearest(perturbed(w2, z2, scale), TYPE, ON)
    w3 = _nearest(perturbed(w3, z3, scale), TYPE, ON)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [OUT, INNER])


@part
def _wide(values, TYPE: tl.constexpr):
    """Values as they are in memory, where bfloat16 is its integer bits, in float32."""
    if TYPE == "bfloat16":
        return _float(values.to(tl.uint32) << 16)
    else:
        return values.to(tl.float32)


@part
def _factor(values, TYPE: tl.constexpr, ON: tl.constexpr):
    """Such values as a product takes them: the interpreter's of bfloat16 loses bits."""
    if TYPE != "bfloat16":
        return values
    elif ON == "interpreter":
        return _wide(values, TYPE)
    else:
        return values.to(tl.bfloat16, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "words",
        "perturbations",
        "rows",
        "bias_stride",
        "parameter",
    ]
)
def run(
    y,
    x,
    weight,
    bias,
    words,
    perturbations,
    rows: tl.int64,
    count: tl.int64,
    inner: tl.int64,
    stride: tl.int64,
    bias_stride: tl.int64,
    parameter,
    DISTRIBUTION: tl.constexpr,
    TYPE: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    ON: tl.constexpr,
):
    """Does one tile of ROWS x OUT elements of y. 16-bit tensors are given as their integer bits.

    Args:
        y, x: contiguous, (perturbations * rows, count) and (perturbations * rows, inner).
        weight: (count, inner), `stride` elements from one row to the next.
        bias: (count,), or (perturbations, count) with a `bias_stride` of `count`.
        words: int32 (4, perturbations): of each perturbation the direction, the low and the high
            word of the key, and the bits of its float32 scale.
        ALIGNED: `inner` is a multiple of four.
    """
    # Programs that follow each other read the same weights.
    program = tl.program_id(0).to(tl.int64)
    down = (rows + (ROWS - 1)) // ROWS
    out = program // (down * perturbations) * OUT
    tile = program % (down * perturbations)
    perturbation = tile // down
    row = (tile - perturbation * down) * ROWS + tl.arange(0, ROWS)
    out = out + tl.arange(0, OUT)
    words += perturbation
    direction = tl.load(words).to(tl.uint32, bitcast=True)
    key_low = tl.load(words + perturbations).to(tl.uint32, bitcast=True)
    key_high = tl.load(words + 2 * perturbations).to(tl.uint32, bitcast=True)
    scale = _float(tl.load(words + 3 * perturbations))
    stream = (key_low, key_high, direction, parameter.to(tl.uint32))

    x += (perturbation * rows + row)[:, None] * inner
    weight += out[:, None] * stride
    index = out[:, None] * inner + 4 * tl.arange(0, INNER // 4)[None, :]
    here = (row < rows)[:, None]
    there = (out < count)[:, None]
    total = tl.full([ROWS, OUT], 0.0, tl.float32)
    for first in range(0, inner, INNER):
        k = first + tl.arange(0, INNER)[None, :]
        some = tl.load(x + k, mask=here & (k < inner), other=0)
        w = tl.load(weight + k, mask=there & (k < inner), other=0)
        w = _displaced(
            *(w, scale, stream, index + first),
            *(DISTRIBUTION, TYPE, ALIGNED, OUT, INNER, ON),
        )
        w = tl.where(k < inner, w, tl.zeros_like(w))
        total = tl.dot(
            _factor(some, TYPE, ON), tl.trans(_factor(w, TYPE, ON)), total, input_precision="ieee"
        )
    if BIAS:
        added = tl.load(bias + perturbation * bias_stride + out, mask=out < count, other=0)
        total += _wide(added, TYPE)[None, :]
    y += (perturbation * rows + row)[:, None] * count + out[None, :]
    tl.store(y, _nearest(total, TYPE, ON), mask=here & (out < count)[None, :])
