"""The definition of every operation, in plain torch, which compiled backends are tested against.

It runs wherever torch has float64 and needs no compiler. It gives the same bits as the compiled
kernels and is far slower: each float32 operation is a pass over memory instead of one instruction
on a register, and each fused multiply-add is emulated by several such passes (float32.py).

Word-valued tensors are int64 and hold integers in ``[0, 2**32)``, since torch has no arithmetic
on unsigned 32-bit integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .. import rules
from ..float32 import fma, mul, sqrt, to_float32
from ..rules import RULES
from ..stream import kind_of
from ..terms import OPERATIONS

if TYPE_CHECKING:
    from ..call import Call
    from ..plan import Segment
    from ..stream import PhiloxState

NAME = "reference"

DISTRIBUTIONS: tuple[str, ...] = ("exact", "rademacher", "lowrank", "flipout")

CHUNK = 2**16
"""The number of elements processed at a time. The temporaries of one chunk are about 16 float64
tensors of this length (8 MiB), whatever the size of the weights; larger chunks fall out of the
cache."""

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PURPOSE_DIRECTION = 0
PURPOSE_ROUNDING = 1
PURPOSE_BUFFER = 2  # of the first buffer; the second has 3
PURPOSE_ROW = 4
PURPOSE_COLUMN = 5
PURPOSE_ROW_SIGN = 6
PURPOSE_COLUMN_SIGN = 7

_WORD = 0xFFFFFFFF


def availability() -> tuple[bool, str]:
    """Whether this backend can run here, and one line on why and at what cost."""
    return True, (
        "always available; slow, as it is plain torch with every fused multiply-add emulated "
        "exactly in float64"
    )


def supports(device: torch.device) -> bool:
    """Whether torch has float64 on the device, which Metal lacks."""
    return device.type not in ("meta", "mps")


# --- Philox -----------------------------------------------------------------------------------


def _multiply(a: int | Tensor, multiplier: int) -> tuple[int | Tensor, int | Tensor]:
    """High and low words of the 64-bit product ``a * multiplier``.

    The multiplier is taken in two halves of 16 bits, so that no intermediate reaches 2**49: an
    int64 product of two words would overflow into its sign.
    """
    low_part = a * (multiplier & 0xFFFF)
    high_part = a * (multiplier >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(
    counter0: int | Tensor,
    counter1: int | Tensor,
    counter2: int | Tensor,
    counter3: int | Tensor,
    key: int,
    rounds: int = 10,
) -> tuple[int | Tensor, int | Tensor, int | Tensor, int | Tensor]:
    """The four output words of Philox4x32 (Salmon et al., SC 2011).

    Counter words are ints or int64 tensors of one shape, each value in ``[0, 2**32)``; words that
    are ints stay scalars until they are combined with a tensor. ``key`` is the 64-bit key, its
    low word used first.
    """
    x0, x1, x2, x3 = counter0, counter1, counter2, counter3
    key0, key1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(rounds):
        high0, low0 = _multiply(x0, PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(x2, PHILOX_MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0 = (key0 + PHILOX_KEY_STEPS[0]) & _WORD
        key1 = (key1 + PHILOX_KEY_STEPS[1]) & _WORD
    return x0, x1, x2, x3


# --- directions -------------------------------------------------------------------------------

_LOG_COEFFICIENTS = (
    -0.14020569622516632,
    0.15383614599704742,
    -0.13997136056423187,
    0.1641702800989151,
    -0.20011073350906372,
    0.250077486038208,
    -0.33333200216293335,
    0.49999937415122986,
)
# ln 2 * 2**-23, negative: it scales the exponent while that still sits in its bit position.
_LOG_EXPONENT = to_float32(-8.262958405176314e-08)
_SIN_COEFFICIENTS = (
    -3.5579418181441724e-05,
    0.002489370759576559,
    -0.08074513077735901,
    0.7853981256484985,
)
_COS_COEFFICIENTS = (-0.00031918685999698937, 0.015850437805056572, -0.3084245026111603, 1.0)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule in fused multiply-adds, highest power first."""
    result: float | Tensor = coefficients[0]
    for coefficient in coefficients[1:]:
        result = fma(result, x, coefficient)
    assert isinstance(result, Tensor)
    return result


def minus_log(u: Tensor) -> Tensor:
    """``-ln u`` for float32 ``u`` in [2**-31, 1], within 9.0e-8 of its value."""
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F2AAAAB) & -0x00800000
    g = (bits - exponent).view(torch.float32) - 1
    s = g * g
    return fma(exponent.float(), _LOG_EXPONENT, fma(_polynomial(g, _LOG_COEFFICIENTS), s, -g))


def sin_cos_eighth_turn(f: Tensor) -> tuple[Tensor, Tensor]:
    """``sin(pi/4 f)`` and ``cos(pi/4 f)`` for float32 ``f`` in [-1, 1], within 8.3e-8."""
    s = f * f
    return _polynomial(s, _SIN_COEFFICIENTS) * f, _polynomial(s, _COS_COEFFICIENTS)


def exact_normals(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float32 normals from two words, by Box-Muller rotated by an eighth turn.

    The rotation cancels the factor sqrt(2) and confines the angle to an eighth turn either side of
    zero; the quadrant is two spare bits, put on as signs. Within 2.0e-6 of the real-number formula
    in the far tails, 8.6e-7 elsewhere.
    """
    # By way of float64, so that the conversion from 31 bits rounds once and to nearest.
    u = (((x0 & 0x7FFFFFFE) | 1).double() * 2.0**-31).float()
    r = sqrt(minus_log(u))
    f = ((x1 & 0x007FFFFF) | 0x40000000).to(torch.int32).view(torch.float32) - 3
    sine, cosine = sin_cos_eighth_turn(f)
    r_cosine = r * cosine
    z0 = fma(r, sine, r_cosine)
    z1 = fma(-r, sine, r_cosine)
    return torch.where(x0 >= 2**31, -z0, z0), torch.where(x1 >= 2**31, -z1, z1)


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _from_calls(
    outputs: Callable[[Words], Words],
    index_offset: int,
    index_stride: int,
    rows: int,
    row_length: int,
    *,
    purpose: int,
    key: int,
    direction: int,
    parameter: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A tensor of shape ``(rows, row_length)`` with four elements a call: element i is output i % 4
    of the call whose block is i // 4, where ``outputs`` maps the call's four words to outputs.

    Element ``(r, i)`` is the one with global index ``index_offset + r * index_stride + i`` (which
    must be below 2**63) of the direction numbered ``direction`` (32 bits) of the parameter
    numbered ``parameter`` (24 bits), under the 64-bit ``key``. The result is held in memory whole;
    the operations below ask for a chunk at a time.
    """
    if rows == 0 or row_length == 0:
        return torch.empty((rows, row_length), dtype=torch.float32, device=device)

    def count(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int64, device=device)

    first = index_offset + index_stride * count(rows)
    phase = first & 3
    # A row needs the calls that cover it from its first block on; their number is that of the row
    # that starts furthest inside its block.
    blocks = (int(phase.max()) + row_length + 3) // 4
    block = (first >> 2)[:, None] + count(blocks)
    words = philox4x32(block & _WORD, block >> 32, direction, parameter | purpose << 24, key)
    covering = torch.stack(outputs(cast(Words, words)), dim=-1).view(rows, 4 * blocks)
    return covering.gather(1, phase[:, None] + count(row_length))


def _normals(x: Words) -> Words:
    return (*exact_normals(x[0], x[1]), *exact_normals(x[2], x[3]))


def _unchanged(x: Words) -> Words:
    return x


exact_direction = functools.partial(_from_calls, _normals, purpose=PURPOSE_DIRECTION)
"""Elements of a direction as a float32 tensor, with the arguments of :func:`_from_calls`."""

rounding_words = functools.partial(_from_calls, _unchanged, purpose=PURPOSE_ROUNDING)
"""The random words of stochastic stores, with the same arguments: one for each element, the same
for every distribution. The words of a buffer have another purpose."""


def rademacher_direction(
    index_offset: int,
    index_stride: int,
    rows: int,
    row_length: int,
    *,
    key: int,
    direction: int,
    parameter: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Signs +1 and -1, with the arguments of :func:`exact_direction`.

    A call gives 128 signs: element i is bit i % 32 of word (i // 32) % 4 of the call whose block
    is i // 128, and a bit that is set stands for -1. Here every element makes a call of its own.
    """
    row = index_offset + index_stride * torch.arange(rows, dtype=torch.int64, device=device)
    index = row[:, None] + torch.arange(row_length, dtype=torch.int64, device=device)
    block = index >> 7
    purpose = PURPOSE_DIRECTION << 24
    words = philox4x32(block & _WORD, block >> 32, direction, parameter | purpose, key)
    word = torch.stack(cast("list[Tensor]", words)).gather(0, ((index >> 5) & 3)[None])[0]
    return (1 - 2 * ((word >> (index & 31)) & 1)).float()


def lowrank_direction(
    index_offset: int,
    index_stride: int,
    rows: int,
    row_length: int,
    *,
    columns: int,
    rank: int = 1,
    key: int,
    direction: int,
    parameter: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``sum_q u_q[i] v_q[j]`` for q < rank, with the arguments of :func:`exact_direction`.

    ``(i, j)`` is the place of an element in the parameter seen as a matrix with ``columns``
    columns. The first term is a product, the others are added by fma in the order of q. Element e
    of a factor is output e % 4 of the normals of the call whose low block word is e // 4 and whose
    high one is q, with a purpose for u and one for v; u is multiplied by 1 / sqrt(rank), rounded to
    float32, where rank is not 1.
    """
    i, of_i, j, of_j = _places(index_offset, index_stride, rows, row_length, columns, device)
    of = key, direction, parameter
    scale = to_float32(1.0 / math.sqrt(rank))
    z: Tensor | None = None
    for q in range(rank):
        u, v = _factor(i, *of, PURPOSE_ROW, q), _factor(j, *of, PURPOSE_COLUMN, q)
        if rank > 1:
            u = mul(u, scale)
        z = mul(u[of_i], v[of_j]) if z is None else fma(u[of_i], v[of_j], z)
    assert z is not None
    return z


def _factor(
    elements: Tensor, key: int, direction: int, parameter: int, purpose: int, q: int = 0
) -> Tensor:
    """The normals of these elements of a factor, of its term q."""
    words = philox4x32(elements >> 2, q, direction, parameter | purpose << 24, key)
    normals = torch.stack(_normals(cast(Words, words)))
    return normals.gather(0, (elements & 3)[None])[0]


def _places(
    index_offset: int, index_stride: int, rows: int, row_length: int, columns: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The rows of a matrix in which there are elements, and for each element which of these it is
    in; and the same for columns."""
    row = index_offset + index_stride * torch.arange(rows, dtype=torch.int64, device=device)
    index = row[:, None] + torch.arange(row_length, dtype=torch.int64, device=device)
    i, of_i = torch.unique(index // columns, return_inverse=True)
    j, of_j = torch.unique(index % columns, return_inverse=True)
    return i, of_i, j, of_j


def flipout_direction(
    index_offset: int,
    index_stride: int,
    rows: int,
    row_length: int,
    *,
    columns: int,
    group: int = 1,
    key: int,
    direction: int,
    parameter: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``u[i, j] (r[i] s[j])`` with the arguments of :func:`lowrank_direction`.

    u is the exact direction numbered ``direction // group``. r[i] is 1 with the sign of the exact
    normal of element i, with a purpose for rows; s[j] the same of j, with one for columns.
    """
    place = index_offset, index_stride, rows, row_length
    i, of_i, j, of_j = _places(*place, columns, device)

    def signs(elements: Tensor, purpose: int) -> Tensor:
        normals = _factor(elements, key, direction, parameter, purpose)
        return torch.copysign(torch.ones_like(normals), normals)

    r, s = signs(i, PURPOSE_ROW_SIGN), signs(j, PURPOSE_COLUMN_SIGN)
    base = direction // group
    u = exact_direction(*place, key=key, direction=base, parameter=parameter, device=device)
    return u * (r[of_i] * s[of_j])


_DIRECTIONS: dict[str, Callable[..., Tensor]] = {
    "exact": exact_direction,
    "rademacher": rademacher_direction,
}


# --- stochastic rounding ----------------------------------------------------------------------


def round_stochastically(value: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``value`` in ``dtype``: words / 2**32, uniform in [0, 1), is added in units of the
    last place of the result, and the rest cut off. So the mean is ``value`` within the range of
    ``dtype``. Beyond its largest number the result may be infinite, as to nearest, except that
    float16 does not round up from that number to infinity."""
    if dtype == torch.float32:
        return value
    bits = value.contiguous().view(torch.int32).long() & _WORD
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        result = (magnitude + (words >> 16)) >> 16
        result = torch.where(magnitude > 0x7F800000, 0x7FC0, result)
    else:
        normal = ((magnitude - (112 << 23) + (words >> 19)) >> 13).clamp(max=0x7BFF)
        # Below 2**-14 the unit stays 2**-24: the smaller the value, the more digits are cut off. Of
        # more than 31 digits the lowest count as 0.
        digits = (126 - (magnitude >> 23)).clamp(min=14)
        beyond = (digits - 31).clamp(min=0)
        significand = ((magnitude & 0x7FFFFF) | 0x800000) >> beyond.clamp(max=31)
        shift = digits - beyond
        subnormal = (significand + (words >> (32 - shift))) >> shift
        subnormal = torch.where(magnitude < 0x00800000, 0, subnormal)
        result = torch.where(magnitude < 0x38800000, subnormal, normal)
        result = torch.where(magnitude >= 0x47800000, 0x7C00, result)
        result = torch.where(magnitude > 0x7F800000, 0x7E00, result)
    return (sign | result).to(torch.int32).to(torch.int16).view(dtype)


# --- operations -------------------------------------------------------------------------------


Piece = tuple[tuple[slice, slice], Sequence[Tensor]]
"""A rectangle of a segment, and float32 values for it before they are rounded: the weights, then
the buffers of a rule that has some."""

Values = Sequence[Tensor]


def _chunks(segment: Segment) -> Iterator[tuple[slice, slice]]:
    """Rectangles of at most CHUNK elements that tile the segment."""
    length = min(segment.row_length, CHUNK)
    height = CHUNK // max(length, 1)
    for row in range(0, segment.rows, height):
        for column in range(0, segment.row_length, CHUNK):
            yield (
                slice(row, min(row + height, segment.rows)),
                slice(column, min(column + length, segment.row_length)),
            )


def _matrix(segment: Segment) -> Tensor:
    """A view of the segment's elements as ``(rows, row_length)``."""
    return segment.tensor.detach().as_strided(
        (segment.rows, segment.row_length), (segment.row_stride, 1)
    )


def _source(segment: Segment) -> Tensor:
    """The same view of the source."""
    return segment.source.detach().as_strided(
        (segment.rows, segment.row_length), (segment.source_stride, 1)
    )


def _direction(
    segment: Segment, state: PhiloxState, chunk: tuple[slice, slice], distribution: str
) -> Tensor:
    name, number = kind_of(distribution)
    if name in _DIRECTIONS:
        return _elements(_DIRECTIONS[name], segment, state, chunk)
    columns = segment.columns
    if not columns:  # one dimension
        return _elements(exact_direction, segment, state, chunk)
    if name == "flipout":
        return _elements(flipout_direction, segment, state, chunk, columns=columns, group=number)
    return _elements(lowrank_direction, segment, state, chunk, columns=columns, rank=number)


def _elements(
    of: Callable[..., Tensor],
    segment: Segment,
    state: PhiloxState,
    chunk: tuple[slice, slice],
    **more: Any,
) -> Tensor:
    rows, columns = chunk
    return of(
        state.offset + segment.index_offset + rows.start * segment.index_stride + columns.start,
        segment.index_stride,
        rows.stop - rows.start,
        columns.stop - columns.start,
        key=state.key,
        direction=state.counter,
        parameter=segment.parameter,
        device=segment.tensor.device,
        **more,
    )


def sum_moments(
    directions: Iterable[Tensor], first: Sequence[float], second: Sequence[float] | None
) -> tuple[Tensor, Tensor | None]:
    """``S1 = sum_k first[k] z_k`` and ``S2 = sum_k second[k] z_k**2`` in float32, newest first.

    ``directions`` yields at least one float32 tensor, all of one shape. S2 is None if ``second``
    is None.
    """
    s1: Tensor | None = None
    s2: Tensor | None = None
    for age, z in enumerate(directions):
        if s1 is None:
            s1 = torch.zeros_like(z)
            s2 = None if second is None else torch.zeros_like(z)
        s1 = rules.summed(s1, z, to_float32(first[age]))
        if second is not None and s2 is not None:
            s2 = rules.summed(s2, mul(z, z), to_float32(second[age]))
    if s1 is None:
        raise ValueError("got no directions, expected at least one")
    return s1, s2


def apply_perturbation(theta: Tensor, z: Tensor, scale: float) -> Tensor:
    """``theta + scale * z`` in float32, before it is rounded to the type of ``theta``."""
    return rules.perturbed(theta.float(), z, to_float32(scale))


def apply_update(
    theta: Tensor,
    directions: Iterable[Tensor],
    first: Sequence[float],
    second: Sequence[float] | None,
    *,
    lr: float,
    eps: float,
    decay: float,
    restore: float,
) -> Tensor:
    """The updated weights in float32, before they are rounded to the type of ``theta``.

    ``directions`` yields z_0 (the newest), z_1, ... as float32 tensors of the shape of ``theta``;
    each is asked for once, so that only one need be in memory::

        t      = theta + restore * z_0                        (left out if restore is 0)
        S1, S2 = sum_k first[k] z_k, sum_k second[k] z_k**2
        theta' = t * decay - lr * S1 / (sqrt(S2) + eps)       (second is None: - lr * S1)
    """
    directions = iter(directions)
    newest = next(directions)
    t = theta.float()
    if to_float32(restore) != 0:
        t = rules.perturbed(t, newest, to_float32(restore))

    def all_directions() -> Iterator[Tensor]:
        yield newest
        yield from directions

    s1, s2 = sum_moments(all_directions(), first, second)
    step = s1 if s2 is None else rules.preconditioned(s1, s2, to_float32(eps))
    return rules.descended(t, step, -to_float32(lr), to_float32(decay))


def rule_direction(rule: str, z: Values, b: Values, n: Sequence[float]) -> Tensor:
    """The direction that a rule perturbs along: z_0, where it has none of its own."""
    return (RULES[rule].direction or rules.default_direction)(z, b, n)


def _buffers(segment: Segment) -> list[Tensor]:
    return [buffer.detach().view(segment.rows, segment.row_length) for buffer in segment.buffers]


def _buffer_values(segment: Segment, chunk: tuple[slice, slice]) -> list[Tensor]:
    return [buffer[chunk].float() for buffer in _buffers(segment)]


def _sample(call: Call, segment: Segment) -> Iterator[Piece]:
    (state,) = call.terms.states()
    for chunk in _chunks(segment):
        yield chunk, (_direction(segment, state, chunk, call.distribution),)


def _perturb(call: Call, segment: Segment) -> Iterator[Piece]:
    terms, source = call.terms, _source(segment)
    for chunk in _chunks(segment):
        z = [_direction(segment, state, chunk, call.distribution) for state in terms.states()]
        b = _buffer_values(segment, chunk)
        along = rule_direction(terms.rule, z, b, terms.numbers.tolist())
        yield chunk, (apply_perturbation(source[chunk], along, call.scale),)


def _update(call: Call, segment: Segment) -> Iterator[Piece]:
    terms = call.terms
    states, first = terms.states(), terms.first.tolist()
    second = terms.second.tolist() if terms.with_second else None
    minus_lr, decay = terms.step.tolist()
    weights = _matrix(segment)
    numbers = dict(lr=-minus_lr, eps=call.eps, decay=decay, restore=call.scale)
    step_of = cast("Callable[..., Any]", RULES[terms.rule].step)
    for chunk in _chunks(segment):
        directions = (_direction(segment, state, chunk, call.distribution) for state in states)
        if terms.rule == "moments":
            yield chunk, (apply_update(weights[chunk], directions, first, second, **numbers),)
            continue
        theta, z = weights[chunk].float(), list(directions)
        b = _buffer_values(segment, chunk)
        n, scale = terms.numbers.tolist(), to_float32(call.scale)
        if scale != 0:
            theta = rules.perturbed(theta, rule_direction(terms.rule, z, b, n), scale)
        step, *after = step_of(z, b, n, to_float32(call.eps))
        yield chunk, (rules.descended(theta, step, minus_lr, decay), *after)


def _moment(call: Call, segment: Segment) -> Iterator[Piece]:
    terms = call.terms
    states, first = terms.states(), terms.first.tolist()
    second = terms.second.tolist() if terms.with_second else None
    for chunk in _chunks(segment):
        directions = (_direction(segment, state, chunk, call.distribution) for state in states)
        s1, s2 = sum_moments(directions, first, second)
        yield chunk, (s1 if s2 is None else s2,)


_OPERATIONS: dict[str, Callable[[Call, Segment], Iterator[Piece]]] = dict(
    zip(OPERATIONS, (_sample, _perturb, _update, _moment), strict=True)
)


@torch.no_grad()
def run(call: Call) -> None:
    for segment in (s for launch in call.plan.launches for s in launch.segments):
        outs = [_matrix(segment), *_buffers(segment)]
        for chunk, values in _OPERATIONS[call.operation](call, segment):
            for purpose, (out, value) in enumerate(
                zip(outs, values, strict=False), PURPOSE_ROUNDING
            ):
                if call.rounding == "stochastic" and out.dtype != torch.float32:
                    newest = call.terms.states()[0]
                    words = _elements(rounding_words, segment, newest, chunk, purpose=purpose)
                    value = round_stochastically(value, words, out.dtype)
                out[chunk].copy_(value)
