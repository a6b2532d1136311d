"""The Triton kernel: a program does one window, consecutive elements of one segment.

triton.py imports it where Triton is installed. The arithmetic is that of csrc/adamezo, in the order
of csrc/cpu/loops.h. A window is aligned in the parameter, not in memory, so that all elements of a
Philox call are in one program and no window straddles two high words of the block index. Values
of calls are held as four tensors, one for each of a call's elements; only weights on their way from
and to memory are one tensor, in the order of memory.
"""

# mypy: ignore-errors
# (Triton reads annotations as the types of a kernel's arguments.)

from __future__ import annotations

from types import FunctionType

import triton
import triton.language as tl

from .. import rules
from .triton import INTERPRETED


def part(function):
    """A function of a kernel. Interpreted, it stays an ordinary one: Triton's interpreter sets
    itself up at each call of a jitted function, which would be most of its work."""
    return function if INTERPRETED else triton.jit(function)


M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)


# --- Philox: csrc/adamezo/philox.h --------------------------------------------------------------


@part
def _product(a, multiplier: tl.constexpr):
    """The high and the low word of one wide product: tl.umulhi and `*` are two multiplications."""
    product = a.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@part
def _low_key(low, round: tl.constexpr):
    return low + ((round * W0) & 0xFFFFFFFF)


@part
def _high_key(high, round: tl.constexpr):
    return high + ((round * W1) & 0xFFFFFFFF)


@part
def _group(key_low, key_high, block, parameter):
    """The words that all directions share at these blocks; `parameter` includes the purpose."""
    high, low = _product(block, M0)
    y0, y1 = _product(high ^ (parameter ^ key_high), M1)
    return y0, y1 ^ _low_key(key_low, 2), low


@part
def _words(key_low, key_high, y0, y1, y2, block_high, direction):
    """The four words of each call of the group."""
    high, low = _product(direction, M1)
    of_y2, of_c2 = _product(high ^ block_high ^ key_low, M0)
    c2, c3 = _product(y0 ^ (low ^ _low_key(key_low, 1)), M0)
    c0, c1 = _product(y2 ^ (of_y2 ^ _high_key(key_high, 1)), M1)
    c0 = c0 ^ y1
    c2 = c2 ^ (of_c2 ^ _high_key(key_high, 2))
    for round in tl.static_range(3, 10):
        high0, low0 = _product(c0, M0)
        high1, low1 = _product(c2, M1)
        c0 = high1 ^ c1 ^ _low_key(key_low, round)
        c1 = low1
        c2 = high0 ^ c3 ^ _high_key(key_high, round)
        c3 = low0
    return c0, c1, c2, c3


# --- float32 arithmetic -------------------------------------------------------------------------


@part
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@part
def _bits(value):
    return value.to(tl.uint32, bitcast=True)


@part
def _of_integer(bits):
    return bits.to(tl.int32, bitcast=True).to(tl.float32)


@part
def fma(a, b, c):
    return tl.fma(a, b, c)


@part
def mul(a, b):
    return a * b


@part
def add(a, b):
    return a + b


@part
def larger(a, b):
    return tl.where(a > b, a, b)


@part
def smaller(a, b):
    return tl.where(a < b, a, b)


@part
def sqrt(a):
    """The correctly rounded root; div is correctly rounded too."""
    return tl.sqrt_rn(a)


@part
def div(a, b):
    return tl.div_rn(a, b)


@part
def nvidia_sqrt(a):
    """The PTX instruction by name, as tl.sqrt_rn and tl.div_rn flush subnormals in Triton 3.4."""
    return tl.inline_asm_elementwise(
        "sqrt.rn.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
    )


@part
def nvidia_div(a, b):
    return tl.inline_asm_elementwise(
        "div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )


# --- rules: rules.py ----------------------------------------------------------------------------


def traced(**operations):
    """The functions of rules.py over these operations instead of those on torch tensors.

    A function looks up the operations that it names in its globals. So the same code with other
    globals is the same formula over other operations, and Triton, which reads a function's source
    and looks names up there too, compiles it as if it stood here. Triton's cache of compiled
    kernels is keyed by the source of all functions called, so it sees a change of any of them.
    """
    names = {"__name__": rules.__name__, **operations}
    for name, function in vars(rules).items():
        if isinstance(function, FunctionType) and function.__module__ == rules.__name__:
            names[name] = part(FunctionType(function.__code__, names, name))
    return names


_SHARED = {"fma": fma, "mul": mul, "add": add, "larger": larger, "smaller": smaller}
RULES = traced(**_SHARED, sqrt=sqrt, div=div)
NVIDIA_RULES = traced(**_SHARED, sqrt=nvidia_sqrt, div=nvidia_div)
perturbed, descended, summed = (RULES[name] for name in ("perturbed", "descended", "summed"))


# --- directions: csrc/adamezo/normal.h, fast_normal.h, rademacher.h -----------------------------


@part
def _exact(x0, x1, ON: tl.constexpr):
    u = _of_integer((x0 & 0x7FFFFFFE) | 1) * 4.656612873077393e-10  # 2**-31
    e = (_bits(u) - 0x3F2AAAAB) & 0xFF800000
    g = _float(_bits(u) - e) - 1.0
    p = tl.fma(g, -0.14020569622516632, 0.15383614599704742)
    p = tl.fma(p, g, -0.13997136056423187)
    p = tl.fma(p, g, 0.1641702800989151)
    p = tl.fma(p, g, -0.20011073350906372)
    p = tl.fma(p, g, 0.250077486038208)
    p = tl.fma(p, g, -0.33333200216293335)
    p = tl.fma(p, g, 0.49999937415122986)
    # Triton 3.4 computes -g as 0 - g: for g = 0 it is the other zero, but the sum is the same.
    p = tl.fma(p, g * g, -g)
    squared = tl.fma(_of_integer(e), -8.262958405176314e-08, p)
    r = nvidia_sqrt(squared) if ON == "cuda" else sqrt(squared)
    f = _float((x1 & 0x007FFFFF) | 0x40000000) - 3.0
    s = f * f
    sine = tl.fma(s, -3.5579418181441724e-05, 0.002489370759576559)
    sine = tl.fma(sine, s, -0.08074513077735901)
    sine = tl.fma(sine, s, 0.7853981256484985) * f
    cosine = tl.fma(s, -0.00031918685999698937, 0.015850437805056572)
    cosine = tl.fma(cosine, s, -0.3084245026111603)
    cosine = tl.fma(cosine, s, 1.0) * r
    z0 = _bits(tl.fma(r, sine, cosine)) ^ (x0 & 0x80000000)
    z1 = _bits(tl.fma(-r, sine, cosine)) ^ (x1 & 0x80000000)
    return _float(z0), _float(z1)


@part
def _special(a, NAME: tl.constexpr):
    """An instruction of NVIDIA's special-function unit."""
    return tl.inline_asm_elementwise(
        NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
    )


@part
def _fast(x0, x1, ON: tl.constexpr):
    u = _of_integer((x0 & 0x7FFFFFFE) | 1) * 4.656612873077393e-10
    angle = _float((x1 & 0x807FFFFF) | 0x40000000) * 0.7853981633974483
    if ON == "cuda":
        radius = _special(tl.abs(_special(u, "lg2") * -1.3862943611198906), "sqrt")
        sine = _special(angle, "sin")
        cosine = _special(angle, "cos")
    else:  # the same formula, for tests
        radius = tl.sqrt(tl.abs(tl.log2(u) * -1.3862943611198906))
        sine = tl.sin(angle)
        cosine = tl.cos(angle)
    z0 = _bits(radius * cosine) ^ ((x0 ^ 0xFFFFFFFF) & 0x80000000)
    return _float(z0), radius * sine


@part
def _sign(word, bit):
    return _float(0x3F800000 | ((word << (31 - bit)) & 0x80000000))


@part
def _direction(
    key_low,
    key_high,
    y0,
    y1,
    y2,
    block_high,
    direction,
    DISTRIBUTION: tl.constexpr,
    WINDOW: tl.constexpr,
    ON: tl.constexpr,
):
    """z at the elements of the window, as four tensors."""
    x0, x1, x2, x3 = _words(key_low, key_high, y0, y1, y2, block_high, direction)
    if DISTRIBUTION == "rademacher":
        four = tl.arange(0, WINDOW // 4).to(tl.uint32)
        word = (four >> 3) & 3
        low = tl.where((word & 1) != 0, x1, x0)
        high = tl.where((word & 1) != 0, x3, x2)
        signs = tl.where((word & 2) != 0, high, low) >> ((four & 7) * 4)
        z0, z1, z2, z3 = _sign(signs, 0), _sign(signs, 1), _sign(signs, 2), _sign(signs, 3)
    elif DISTRIBUTION == "fast":
        z0, z1 = _fast(x0, x1, ON)
        z2, z3 = _fast(x2, x3, ON)
    else:
        z0, z1 = _exact(x0, x1, ON)
        z2, z3 = _exact(x2, x3, ON)
    return z0, z1, z2, z3


# --- weights and buffers: csrc/adamezo/rounding.h -----------------------------------------------


@part
def _pointers(address, ALIGNED: tl.constexpr, TYPE: tl.constexpr, WINDOW: tl.constexpr):
    """Pointers to the window's elements; ALIGNED: to four of them. bfloat16 is read as its integer
    bits: the interpreter's conversions lose bits, and on a device a shift is as cheap."""
    if TYPE == "float32":
        first = address.to(tl.pointer_type(tl.float32))
    elif TYPE == "float16":
        first = address.to(tl.pointer_type(tl.float16))
    else:
        first = address.to(tl.pointer_type(tl.uint16))
    pointers = first + tl.arange(0, WINDOW)
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16 if TYPE == "float32" else 8)
    return pointers


@part
def _load(address, low, high, whole, TYPE: tl.constexpr, WINDOW: tl.constexpr):
    """The window's values in float32, as four tensors."""
    if whole:
        values = tl.load(_pointers(address, True, TYPE, WINDOW))
    else:
        i = tl.arange(0, WINDOW)
        inside = (i >= low) & (i < high)
        values = tl.load(_pointers(address, False, TYPE, WINDOW), mask=inside, other=0)
    if TYPE == "bfloat16":
        values = _float(values.to(tl.uint32) << 16)
    else:
        values = values.to(tl.float32)
    even, odd = tl.split(tl.reshape(values, [WINDOW // 4, 2, 2]))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@part
def _nearest(value, TYPE: tl.constexpr, ON: tl.constexpr):
    """`value` rounded to nearest even."""
    if TYPE == "float32":
        return value
    elif TYPE == "float16":
        return value.to(tl.float16)
    elif ON == "interpreter":
        bits = _bits(value)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    else:
        return value.to(tl.bfloat16).to(tl.uint16, bitcast=True)


@part
def _stochastic(value, random, TYPE: tl.constexpr):
    """`random` / 2^32 is added in units of the last place of the result, and the rest cut off."""
    bits = _bits(value)
    magnitude = bits & 0x7FFFFFFF
    if TYPE == "bfloat16":
        rounded = (bits + (random >> 16)) >> 16
        return tl.where(magnitude > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    else:
        sign = (bits >> 16) & 0x8000
        half = (magnitude - 0x38000000 + (random >> 19)) >> 13  # 112 << 23
        half = tl.where(half > 0x7BFF, 0x7BFF, half)
        # Values below 2^-14. Shift amounts stay in range even where the result is not used.
        digits = tl.where(magnitude < 0x38800000, 126 - (magnitude >> 23), 14)
        beyond = tl.where(digits > 31, digits - 31, 0)
        significand = ((magnitude & 0x7FFFFF) | 0x800000) >> tl.where(beyond > 31, 31, beyond)
        shift = digits - beyond
        below = (significand + (random >> (32 - shift))) >> shift
        half = tl.where(magnitude < 0x38800000, below, half)
        half = tl.where(magnitude < 0x00800000, 0, half)
        half = tl.where(magnitude >= 0x47800000, 0x7C00, half)
        half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
        return (sign | half).to(tl.uint16).to(tl.float16, bitcast=True)


@part
def _store(
    values,
    address,
    call,
    span,
    PURPOSE: tl.constexpr,
    TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WINDOW: tl.constexpr,
    ON: tl.constexpr,
):
    """Stores four tensors; `call` and PURPOSE select the random words of a stochastic store."""
    v0, v1, v2, v3 = values
    key_low, key_high, index, direction, parameter = call
    low, high, whole = span
    if STOCHASTIC and TYPE != "float32":
        block = (index >> 2).to(tl.uint32) + tl.arange(0, WINDOW // 4).to(tl.uint32)
        y0, y1, y2 = _group(key_low, key_high, block, parameter | (PURPOSE << 24))
        block_high = (index >> 34).to(tl.uint32)
        r0, r1, r2, r3 = _words(key_low, key_high, y0, y1, y2, block_high, direction)
        v0 = _stochastic(v0, r0, TYPE)
        v1 = _stochastic(v1, r1, TYPE)
        v2 = _stochastic(v2, r2, TYPE)
        v3 = _stochastic(v3, r3, TYPE)
    else:
        v0 = _nearest(v0, TYPE, ON)
        v1 = _nearest(v1, TYPE, ON)
        v2 = _nearest(v2, TYPE, ON)
        v3 = _nearest(v3, TYPE, ON)
    values = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), [WINDOW])
    if whole:
        tl.store(_pointers(address, True, TYPE, WINDOW), values)
    else:
        i = tl.arange(0, WINDOW)
        inside = (i >= low) & (i < high)
        tl.store(_pointers(address, False, TYPE, WINDOW), values, mask=inside)


# --- the operations: csrc/cpu/loops.h -----------------------------------------------------------

# At every fourth element: z, a tensor for each of two directions; b, one for each of two buffers;
# n, the step's own numbers. A rule with fewer has another tensor in the place.


@part
def _numbers(words):
    """The RULE_NUMBERS numbers. The compiler removes reads of those that a rule does not use."""
    return (
        _float(tl.load(words)),
        _float(tl.load(words + 1)),
        _float(tl.load(words + 2)),
        _float(tl.load(words + 3)),
        _float(tl.load(words + 4)),
        _float(tl.load(words + 5)),
        _float(tl.load(words + 6)),
        _float(tl.load(words + 7)),
    )


@part
def _restored(theta, along, scale):
    """The restored weights; unchanged at a scale of 0, which would turn -0 into 0."""
    return tl.where(scale != 0.0, perturbed(theta, along, scale), theta)


@part
def _rule_update(
    theta, z, b, n, scalars, DIRECTION: tl.constexpr, STEP: tl.constexpr, BUFFERS: tl.constexpr
):
    """The new weights and the new values of both buffers."""
    scale, minus_lr, eps, decay = scalars
    theta = _restored(theta, DIRECTION(z, b, n), scale)
    made = STEP(z, b, n, eps)
    return descended(theta, made[0], minus_lr, decay), made[1], made[BUFFERS]


@triton.jit(
    do_not_specialize=[
        "table",
        "words",
        "segments",
        "horizon",
        "offset",
        "first_program",
        "key_low",
        "key_high",
        "scale",
        "eps",
    ]
)
def run(
    table,
    words,
    segments,
    horizon,
    offset: tl.int64,
    first_program: tl.int64,
    key_low,
    key_high,
    scale,
    eps,
    OPERATION: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    TYPE: tl.constexpr,
    SECOND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BUFFERS: tl.constexpr,
    DIRECTION: tl.constexpr,
    STEP: tl.constexpr,
    BUFFER_TYPE: tl.constexpr,
    WINDOW: tl.constexpr,
    ON: tl.constexpr,
):
    """Runs one window.

    Args:
        table: int64 [segments, 13], the columns of csrc/adamezo/segment.h, but `first`: the number
            of windows of all segments before this one.
        words: the words of adamezo_kernels.terms.Terms.
        offset: added to every element index.
        first_program: the index of this launch's program 0 among all programs.
        key_low, key_high: the words of the key, as int32.
        scale, eps: the bits of a float32, as int32, so that Triton has no choice of a type.
        DIRECTIONS, BUFFERS: how many a rule has; 0 directions stand for sums of directions, or
            for a perturbation along z.
        DIRECTION, STEP: the rule's functions, traced.
        BUFFER_TYPE: the type of its buffers; "" where it has none.
    """
    key_low = key_low.to(tl.uint32, bitcast=True)
    key_high = key_high.to(tl.uint32, bitcast=True)

    # The last segment whose windows begin at or before this one.
    program = tl.program_id(0) + first_program.to(tl.int64)
    segment = segments * 0
    behind = segments
    while behind - segment > 1:
        middle = (segment + behind) // 2
        before = tl.load(table + middle * 13 + 11) <= program
        segment = tl.where(before, middle, segment)
        behind = tl.where(before, behind, middle)
    table += segment * 13
    address = tl.load(table)
    source = tl.load(table + 1)
    row_length = tl.load(table + 3)
    index = tl.load(table + 6) + offset
    parameter = tl.load(table + 8).to(tl.uint32)
    if BUFFERS > 0:
        buffer = tl.load(table + 9)
        second_buffer = tl.load(table + 10) if BUFFERS > 1 else buffer
    window = program - tl.load(table + 11)

    # Every row has as many windows as its length could need at the worst alignment.
    SIZE: tl.constexpr = 4 if TYPE == "float32" else 2
    BUFFER_SIZE: tl.constexpr = 4 if BUFFER_TYPE == "float32" else 2
    if tl.load(table + 2) > 1:
        windows = (row_length + (2 * WINDOW - 2)) // WINDOW
        row = window // windows
        window -= row * windows
        address += row * tl.load(table + 4) * SIZE
        source += row * tl.load(table + 5) * SIZE
        index += row * tl.load(table + 7)
        if BUFFERS > 0:
            buffer += row * row_length * BUFFER_SIZE
            second_buffer += row * row_length * BUFFER_SIZE
    before = index & (WINDOW - 1)  # elements of the row's first window that lie before the row
    distance = window * WINDOW - before
    low = tl.maximum(-distance, 0).to(tl.int32)
    high = tl.minimum(row_length - distance, WINDOW).to(tl.int32)
    if high <= low:
        return
    index += distance
    address += distance * SIZE
    source += distance * SIZE
    whole = (low == 0) & (high == WINDOW) & (((address | source) & (4 * SIZE - 1)) == 0)
    if BUFFERS > 0:
        buffer += distance * BUFFER_SIZE
        second_buffer += distance * BUFFER_SIZE
        whole = whole & (((buffer | second_buffer) & (4 * BUFFER_SIZE - 1)) == 0)

    four = tl.arange(0, WINDOW // 4)
    if DISTRIBUTION == "rademacher":
        block = (index >> 7).to(tl.uint32) + (four >> 5).to(tl.uint32)
        block_high = (index >> 39).to(tl.uint32)
    else:
        block = (index >> 2).to(tl.uint32) + four.to(tl.uint32)
        block_high = (index >> 34).to(tl.uint32)
    y0, y1, y2 = _group(key_low, key_high, block, parameter)

    if OPERATION == "perturb" or OPERATION == "update":
        v0, v1, v2, v3 = _load(source, low, high, whole, TYPE, WINDOW)
    newest = tl.load(words).to(tl.uint32, bitcast=True)
    z0, z1, z2, z3 = _direction(
        key_low, key_high, y0, y1, y2, block_high, newest, DISTRIBUTION, WINDOW, ON
    )
    scale = _float(scale)
    call, span = (key_low, key_high, index, newest, parameter), (low, high, whole)
    if OPERATION == "sample":
        v0, v1, v2, v3 = z0, z1, z2, z3
    elif DIRECTIONS > 0:
        n = _numbers(words + 3 * horizon + 2)
        a0, a1, a2, a3 = z0, z1, z2, z3
        if DIRECTIONS > 1:
            direction = tl.load(words + 1).to(tl.uint32, bitcast=True)
            a0, a1, a2, a3 = _direction(
                key_low, key_high, y0, y1, y2, block_high, direction, DISTRIBUTION, WINDOW, ON
            )
        k0, k1, k2, k3 = z0, z1, z2, z3  # a rule without buffers ignores them
        if BUFFERS > 0:
            k0, k1, k2, k3 = _load(buffer, low, high, whole, BUFFER_TYPE, WINDOW)
        m0, m1, m2, m3 = k0, k1, k2, k3
        if BUFFERS > 1:
            m0, m1, m2, m3 = _load(second_buffer, low, high, whole, BUFFER_TYPE, WINDOW)
        if OPERATION == "perturb":
            v0 = perturbed(v0, DIRECTION((z0, a0), (k0, m0), n), scale)
            v1 = perturbed(v1, DIRECTION((z1, a1), (k1, m1), n), scale)
            v2 = perturbed(v2, DIRECTION((z2, a2), (k2, m2), n), scale)
            v3 = perturbed(v3, DIRECTION((z3, a3), (k3, m3), n), scale)
        else:
            minus_lr = _float(tl.load(words + 3 * horizon))
            decay = _float(tl.load(words + 3 * horizon + 1))
            scalars = (scale, minus_lr, _float(eps), decay)
            v0, k0, m0 = _rule_update(v0, (z0, a0), (k0, m0), n, scalars, DIRECTION, STEP, BUFFERS)
            v1, k1, m1 = _rule_update(v1, (z1, a1), (k1, m1), n, scalars, DIRECTION, STEP, BUFFERS)
            v2, k2, m2 = _rule_update(v2, (z2, a2), (k2, m2), n, scalars, DIRECTION, STEP, BUFFERS)
            v3, k3, m3 = _rule_update(v3, (z3, a3), (k3, m3), n, scalars, DIRECTION, STEP, BUFFERS)
    elif OPERATION == "perturb":
        v0 = perturbed(v0, z0, scale)
        v1 = perturbed(v1, z1, scale)
        v2 = perturbed(v2, z2, scale)
        v3 = perturbed(v3, z3, scale)
    else:
        if OPERATION == "update":
            v0 = _restored(v0, z0, scale)
            v1 = _restored(v1, z1, scale)
            v2 = _restored(v2, z2, scale)
            v3 = _restored(v3, z3, scale)
        # All z * z of signs are 1, so that S2 is one number.
        SQUARES: tl.constexpr = SECOND and DISTRIBUTION != "rademacher"
        zero = tl.full([WINDOW // 4], 0.0, tl.float32)
        a = _float(tl.load(words + horizon))
        s0, s1, s2, s3 = (
            summed(zero, z0, a),
            summed(zero, z1, a),
            summed(zero, z2, a),
            summed(zero, z3, a),
        )
        b = _float(tl.load(words + 2 * horizon)) if SECOND else 0.0
        q0, q1, q2, q3 = zero, zero, zero, zero
        if SQUARES:
            q0, q1, q2, q3 = (
                summed(zero, z0 * z0, b),
                summed(zero, z1 * z1, b),
                summed(zero, z2 * z2, b),
                summed(zero, z3 * z3, b),
            )
        of_signs = b
        for k in range(1, horizon):
            direction = tl.load(words + k).to(tl.uint32, bitcast=True)
            z0, z1, z2, z3 = _direction(
                key_low, key_high, y0, y1, y2, block_high, direction, DISTRIBUTION, WINDOW, ON
            )
            a = _float(tl.load(words + horizon + k))
            s0 = summed(s0, z0, a)
            s1 = summed(s1, z1, a)
            s2 = summed(s2, z2, a)
            s3 = summed(s3, z3, a)
            if SECOND:
                b = _float(tl.load(words + 2 * horizon + k))
                if SQUARES:
                    q0 = summed(q0, z0 * z0, b)
                    q1 = summed(q1, z1 * z1, b)
                    q2 = summed(q2, z2 * z2, b)
                    q3 = summed(q3, z3 * z3, b)
                else:
                    of_signs += b
        if SECOND and not SQUARES:
            q0 += of_signs
            q1, q2, q3 = q0, q0, q0
        if OPERATION == "update":
            minus_lr = _float(tl.load(words + 3 * horizon))
            decay = _float(tl.load(words + 3 * horizon + 1))
            if SECOND:
                eps = _float(eps)
                s0 = STEP(s0, q0, eps)
                s1 = STEP(s1, q1, eps)
                s2 = STEP(s2, q2, eps)
                s3 = STEP(s3, q3, eps)
            v0 = descended(v0, s0, minus_lr, decay)
            v1 = descended(v1, s1, minus_lr, decay)
            v2 = descended(v2, s2, minus_lr, decay)
            v3 = descended(v3, s3, minus_lr, decay)
        elif SECOND:
            v0, v1, v2, v3 = q0, q1, q2, q3
        else:
            v0, v1, v2, v3 = s0, s1, s2, s3
    _store((v0, v1, v2, v3), address, call, span, 1, TYPE, STOCHASTIC, WINDOW, ON)
    if BUFFERS > 0 and OPERATION == "update":
        _store((k0, k1, k2, k3), buffer, call, span, 2, BUFFER_TYPE, STOCHASTIC, WINDOW, ON)
        if BUFFERS > 1:
            _store(
                (m0, m1, m2, m3), second_buffer, call, span, 3, BUFFER_TYPE, STOCHASTIC, WINDOW, ON
            )


@triton.jit
def round_fma(values):
    """values[3] = fma(values[0], values[1], values[2]), to test how it is rounded."""
    a, b, c = tl.load(values), tl.load(values + 1), tl.load(values + 2)
    tl.store(values + 3, tl.fma(a, b, c))
