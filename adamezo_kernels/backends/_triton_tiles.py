"""The Triton kernel of `lowrank` directions: a program does one tile of a matrix, rows by columns.

triton.py imports it where Triton is installed. The normals of a tile's rows and columns are made
once for each term of a direction, and an element costs their product. Values are held as four
tensors of (rows, columns / 4), one for each column of a group of four, as in _triton_kernels.py:
a thread then has a few rows of four columns, and takes few factors for many products.
"""

# mypy: ignore-errors
# (Triton reads annotations as the types of a kernel's arguments.)

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_kernels import (
    _exact,
    _float,
    _group,
    _nearest,
    _numbers,
    _rule_update,
    _stochastic,
    _words,
    descended,
    part,
    perturbed,
    summed,
)

ROW = tl.constexpr(4 << 24)  # purposes of csrc/adamezo/philox.h
COLUMN = tl.constexpr(5 << 24)


# --- directions: csrc/adamezo/low_rank.h --------------------------------------------------------


@part
def _places(key_low, key_high, element, of, scale):
    """The places of these elements of a factor in its stream, and what they are multiplied by;
    `of` is the parameter with the factor's purpose."""
    y0, y1, y2 = _group(key_low, key_high, (element >> 2).to(tl.uint32), of)
    return y0, y1, y2, element.to(tl.int32) & 3, scale


@part
def _factor(key_low, key_high, places, term, direction, ON: tl.constexpr):
    """The factor at these places: exact normals, each from a call of its own."""
    y0, y1, y2, output, scale = places
    x0, x1, x2, x3 = _words(key_low, key_high, y0, y1, y2, term, direction)
    behind = output >= 2
    z0, z1 = _exact(tl.where(behind, x2, x0), tl.where(behind, x3, x1), ON)
    return tl.where((output & 1) != 0, z1, z0) * scale


@part
def _term(
    key_low,
    key_high,
    places,
    term,
    direction,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ON: tl.constexpr,
):
    """u of one term, and the four v that belong to the four tensors of a tile."""
    # Those of rows and of columns are as many as the threads: they are made together.
    both = _factor(key_low, key_high, places, term, direction, ON)
    FOUR: tl.constexpr = COLUMNS // 4
    u = tl.gather(both, tl.arange(0, ROWS), 0)[:, None]
    v0 = tl.gather(both, tl.arange(ROWS, ROWS + FOUR), 0)[None, :]
    v1 = tl.gather(both, tl.arange(ROWS + FOUR, ROWS + 2 * FOUR), 0)[None, :]
    v2 = tl.gather(both, tl.arange(ROWS + 2 * FOUR, ROWS + 3 * FOUR), 0)[None, :]
    v3 = tl.gather(both, tl.arange(ROWS + 3 * FOUR, ROWS + 4 * FOUR), 0)[None, :]
    return u, v0, v1, v2, v3


@part
def _direction(
    key_low,
    key_high,
    places,
    rank,
    direction,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ON: tl.constexpr,
):
    """z at the elements of the tile, as four tensors."""
    zero = (rank * 0).to(tl.uint32)
    u, v0, v1, v2, v3 = _term(key_low, key_high, places, zero, direction, ROWS, COLUMNS, ON)
    z0, z1, z2, z3 = u * v0, u * v1, u * v2, u * v3
    for q in range(1, rank):
        u, v0, v1, v2, v3 = _term(key_low, key_high, places, zero + q, direction, ROWS, COLUMNS, ON)
        z0 = tl.fma(u, v0, z0)
        z1 = tl.fma(u, v1, z1)
        z2 = tl.fma(u, v2, z2)
        z3 = tl.fma(u, v3, z3)
    return z0, z1, z2, z3


# --- weights and buffers ------------------------------------------------------------------------


@part
def _pointer(address, TYPE: tl.constexpr):
    """bfloat16 is read as its integer bits, as in _triton_kernels.py."""
    if TYPE == "float32":
        return address.to(tl.pointer_type(tl.float32))
    elif TYPE == "float16":
        return address.to(tl.pointer_type(tl.float16))
    else:
        return address.to(tl.pointer_type(tl.uint16))


@part
def _aligned(address, stride, TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to the elements of a whole tile, aligned to four of them."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    pointers = _pointer(address, TYPE) + row * stride + column
    return tl.multiple_of(pointers, [1, 16 if TYPE == "float32" else 8])


@part
def _single(address, stride, TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to every fourth element of a tile."""
    row, column = tl.arange(0, ROWS)[:, None], 4 * tl.arange(0, COLUMNS // 4)[None, :]
    return _pointer(address, TYPE) + row * stride + column


@part
def _inside(span, t: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether columns t, t + 4, ... of the tile are elements of the segment."""
    low, high, first, last, end, _ = span
    row, column = tl.arange(0, ROWS)[:, None], 4 * tl.arange(0, COLUMNS // 4)[None, :] + t
    in_row = (column >= tl.where(row == 0, first, low)) & (
        column < tl.where(row == last, end, high)
    )
    return (row <= last) & in_row


@part
def _load(address, stride, span, TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile's values in float32, as four tensors."""
    if span[5]:
        values = tl.load(_aligned(address, stride, TYPE, ROWS, COLUMNS))
        even, odd = tl.split(tl.reshape(values, [ROWS, COLUMNS // 4, 2, 2]))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
    else:
        pointers = _single(address, stride, TYPE, ROWS, COLUMNS)
        v0 = tl.load(pointers, mask=_inside(span, 0, ROWS, COLUMNS), other=0)
        v1 = tl.load(pointers + 1, mask=_inside(span, 1, ROWS, COLUMNS), other=0)
        v2 = tl.load(pointers + 2, mask=_inside(span, 2, ROWS, COLUMNS), other=0)
        v3 = tl.load(pointers + 3, mask=_inside(span, 3, ROWS, COLUMNS), other=0)
    return _wide(v0, TYPE), _wide(v1, TYPE), _wide(v2, TYPE), _wide(v3, TYPE)


@part
def _wide(values, TYPE: tl.constexpr):
    if TYPE == "bfloat16":
        return _float(values.to(tl.uint32) << 16)
    else:
        return values.to(tl.float32)


@part
def _random(call, PURPOSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The random words of a stochastic store: four tensors."""
    key_low, key_high, index, index_stride, direction, parameter = call
    of = parameter | (PURPOSE << 24)
    first = index + tl.arange(0, ROWS) * index_stride
    block = (first >> 2)[:, None] + tl.arange(0, COLUMNS // 4)[None, :]
    y0, y1, y2 = _group(key_low, key_high, block.to(tl.uint32), of)
    high = (block >> 32).to(tl.uint32)
    r0, r1, r2, r3 = _words(key_low, key_high, y0, y1, y2, high, direction)
    if ((index | index_stride) & 3) != 0:
        # Four columns of a row may be in two calls.
        block += 1
        y0, y1, y2 = _group(key_low, key_high, block.to(tl.uint32), of)
        high = (block >> 32).to(tl.uint32)
        r4, r5, r6, _ = _words(key_low, key_high, y0, y1, y2, high, direction)
        one = (first & 1)[:, None] != 0
        two = (first & 2)[:, None] != 0
        r0 = tl.where(one, r1, r0)
        r1 = tl.where(one, r2, r1)
        r2 = tl.where(one, r3, r2)
        r3 = tl.where(one, r4, r3)
        r4 = tl.where(one, r5, r4)
        r5 = tl.where(one, r6, r5)
        r0 = tl.where(two, r2, r0)
        r1 = tl.where(two, r3, r1)
        r2 = tl.where(two, r4, r2)
        r3 = tl.where(two, r5, r3)
    return r0, r1, r2, r3


@part
def _store(
    values,
    address,
    stride,
    call,
    span,
    PURPOSE: tl.constexpr,
    TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ON: tl.constexpr,
):
    """Stores four tensors; `call` and PURPOSE select the random words of a stochastic store."""
    v0, v1, v2, v3 = values
    if STOCHASTIC and TYPE != "float32":
        r0, r1, r2, r3 = _random(call, PURPOSE, ROWS, COLUMNS)
        v0 = _stochastic(v0, r0, TYPE)
        v1 = _stochastic(v1, r1, TYPE)
        v2 = _stochastic(v2, r2, TYPE)
        v3 = _stochastic(v3, r3, TYPE)
    else:
        v0 = _nearest(v0, TYPE, ON)
        v1 = _nearest(v1, TYPE, ON)
        v2 = _nearest(v2, TYPE, ON)
        v3 = _nearest(v3, TYPE, ON)
    if span[5]:
        whole = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), [ROWS, COLUMNS])
        tl.store(_aligned(address, stride, TYPE, ROWS, COLUMNS), whole)
    else:
        pointers = _single(address, stride, TYPE, ROWS, COLUMNS)
        tl.store(pointers, v0, mask=_inside(span, 0, ROWS, COLUMNS))
        tl.store(pointers + 1, v1, mask=_inside(span, 1, ROWS, COLUMNS))
        tl.store(pointers + 2, v2, mask=_inside(span, 2, ROWS, COLUMNS))
        tl.store(pointers + 3, v3, mask=_inside(span, 3, ROWS, COLUMNS))


@part
def _int32(a):
    return a.to(tl.int32)


# --- the operations: csrc/cpu/loops.h -----------------------------------------------------------


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
        "rank",
        "row_scale",
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
    rank,
    row_scale,
    OPERATION: tl.constexpr,
    TYPE: tl.constexpr,
    SECOND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BUFFERS: tl.constexpr,
    DIRECTION: tl.constexpr,
    STEP: tl.constexpr,
    BUFFER_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ON: tl.constexpr,
):
    """Runs one tile. The arguments are those of the kernel in _triton_kernels.py, and:

    Args:
        table: its column `first` counts the tiles of all segments before this one.
        rank: the number of terms of a direction.
        row_scale: the bits of a float32, which u is multiplied by.
    """
    key_low = key_low.to(tl.uint32, bitcast=True)
    key_high = key_high.to(tl.uint32, bitcast=True)

    # The last segment whose tiles begin at or before this one.
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
    rows = tl.load(table + 2)
    width = tl.load(table + 3)
    stride = tl.load(table + 4)
    source_stride = tl.load(table + 5)
    index = tl.load(table + 6) + offset
    index_stride = tl.load(table + 7)
    parameter = tl.load(table + 8).to(tl.uint32)
    buffer = tl.load(table + 9)
    second_buffer = tl.load(table + 10)
    buffer_stride = width
    columns = tl.load(table + 12)
    tile = program - tl.load(table + 11)

    # Row r of what is tiled begins at the segment's element `begin` + r * `apart`. Those of one row
    # of at least a matrix's row are the matrix's, of which the first and the last may be in part.
    total = width
    begin = width * 0
    apart = width * 0
    if (rows == 1) & (width >= columns):
        begin = -(index % columns)
        rows = (width - begin + columns - 1) // columns
        width = columns
        stride = columns
        source_stride = columns
        index_stride = columns
        buffer_stride = columns
        apart = columns
        across = (columns + (COLUMNS - 1)) // COLUMNS
        shift = width * 0
    else:
        # So that the columns of a call are in one tile.
        across = (width + (COLUMNS + 2)) // COLUMNS
        shift = index % columns & 3
    down = tile // across
    row = down * ROWS
    column = (tile - down * across) * COLUMNS - shift  # of the tile's corner
    if (row >= rows) | (column >= width):
        return
    index += begin + row * index_stride + column

    # The columns of the tile that are in the segment; of its first and its last row there may be
    # fewer, where the segment begins or ends inside of a row.
    last = tl.minimum(rows - 1 - row, ROWS - 1)
    low = tl.maximum(-column, 0)
    high = tl.minimum(width - column, COLUMNS)
    first = tl.minimum(tl.maximum(-(begin + row * apart) - column, low), COLUMNS)
    end = tl.maximum(tl.minimum(total - begin - (row + last) * apart - column, high), 0)
    whole = (last == ROWS - 1) & (first == 0) & (end == COLUMNS)

    SIZE: tl.constexpr = 4 if TYPE == "float32" else 2
    BUFFER_SIZE: tl.constexpr = 4 if BUFFER_TYPE == "float32" else 2
    address += (begin + row * stride + column) * SIZE
    source += (begin + row * source_stride + column) * SIZE
    whole = whole & (((address | source) & (4 * SIZE - 1)) == 0)
    whole = whole & (((stride | source_stride) & 3) == 0)
    if BUFFERS > 0:
        distance = (begin + row * buffer_stride + column) * BUFFER_SIZE
        buffer += distance
        second_buffer += distance
        if BUFFERS == 1:
            second_buffer = buffer
        whole = whole & (((buffer | second_buffer) & (4 * BUFFER_SIZE - 1)) == 0)
        whole = whole & ((buffer_stride & 3) == 0)

    row_scale = _float(row_scale)
    # A lane for each row; then one for every fourth column, for those behind them, and so on.
    lane = tl.arange(0, ROWS + COLUMNS)
    of_rows = lane < ROWS
    n = lane - ROWS
    element = tl.where(
        of_rows,
        index // columns + lane * (index_stride // columns),
        index % columns + (n % (COLUMNS // 4) * 4 + n // (COLUMNS // 4)),
    )
    of = tl.where(of_rows, parameter | ROW, parameter | COLUMN)
    places = _places(key_low, key_high, element, of, tl.where(of_rows, row_scale, 1.0))

    span = (_int32(low), _int32(high), _int32(first), _int32(last), _int32(end), whole)
    newest = tl.load(words).to(tl.uint32, bitcast=True)
    z0, z1, z2, z3 = _direction(key_low, key_high, places, rank, newest, ROWS, COLUMNS, ON)
    scale = _float(scale)
    call = (key_low, key_high, index, index_stride, newest, parameter)
    if OPERATION == "sample":
        v0, v1, v2, v3 = z0, z1, z2, z3
    elif DIRECTIONS > 0:
        v0, v1, v2, v3 = _load(source, source_stride, span, TYPE, ROWS, COLUMNS)
        n = _numbers(words + 3 * horizon + 2)
        a0, a1, a2, a3 = z0, z1, z2, z3
        if DIRECTIONS > 1:
            direction = tl.load(words + 1).to(tl.uint32, bitcast=True)
            a0, a1, a2, a3 = _direction(
                key_low, key_high, places, rank, direction, ROWS, COLUMNS, ON
            )
        k0, k1, k2, k3 = z0, z1, z2, z3  # a rule without buffers ignores them
        if BUFFERS > 0:
            k0, k1, k2, k3 = _load(buffer, buffer_stride, span, BUFFER_TYPE, ROWS, COLUMNS)
        m0, m1, m2, m3 = k0, k1, k2, k3
        if BUFFERS > 1:
            m0, m1, m2, m3 = _load(second_buffer, buffer_stride, span, BUFFER_TYPE, ROWS, COLUMNS)
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
        v0, v1, v2, v3 = _load(source, source_stride, span, TYPE, ROWS, COLUMNS)
        v0 = perturbed(v0, z0, scale)
        v1 = perturbed(v1, z1, scale)
        v2 = perturbed(v2, z2, scale)
        v3 = perturbed(v3, z3, scale)
    else:
        zero = tl.full([ROWS, COLUMNS // 4], 0.0, tl.float32)
        a = _float(tl.load(words + horizon))
        s0, s1, s2, s3 = (
            summed(zero, z0, a),
            summed(zero, z1, a),
            summed(zero, z2, a),
            summed(zero, z3, a),
        )
        q0, q1, q2, q3 = zero, zero, zero, zero
        if SECOND:
            b = _float(tl.load(words + 2 * horizon))
            q0, q1, q2, q3 = (
                summed(zero, z0 * z0, b),
                summed(zero, z1 * z1, b),
                summed(zero, z2 * z2, b),
                summed(zero, z3 * z3, b),
            )
        for k in range(1, horizon):
            direction = tl.load(words + k).to(tl.uint32, bitcast=True)
            z0, z1, z2, z3 = _direction(
                key_low, key_high, places, rank, direction, ROWS, COLUMNS, ON
            )
            a = _float(tl.load(words + horizon + k))
            s0 = summed(s0, z0, a)
            s1 = summed(s1, z1, a)
            s2 = summed(s2, z2, a)
            s3 = summed(s3, z3, a)
            if SECOND:
                b = _float(tl.load(words + 2 * horizon + k))
                q0 = summed(q0, z0 * z0, b)
                q1 = summed(q1, z1 * z1, b)
                q2 = summed(q2, z2 * z2, b)
                q3 = summed(q3, z3 * z3, b)
        if OPERATION == "update":
            minus_lr = _float(tl.load(words + 3 * horizon))
            decay = _float(tl.load(words + 3 * horizon + 1))
            if SECOND:
                eps = _float(eps)
                s0 = STEP(s0, q0, eps)
                s1 = STEP(s1, q1, eps)
                s2 = STEP(s2, q2, eps)
                s3 = STEP(s3, q3, eps)
            # The weights would take a third of the registers of the loop, which a direction that
            # is made twice costs less than.
            v0, v1, v2, v3 = _load(source, source_stride, span, TYPE, ROWS, COLUMNS)
            if scale != 0.0:
                again = tl.load(words, volatile=True).to(tl.uint32, bitcast=True)
                z0, z1, z2, z3 = _direction(
                    key_low, key_high, places, rank, again, ROWS, COLUMNS, ON
                )
                v0 = perturbed(v0, z0, scale)
                v1 = perturbed(v1, z1, scale)
                v2 = perturbed(v2, z2, scale)
                v3 = perturbed(v3, z3, scale)
            v0 = descended(v0, s0, minus_lr, decay)
            v1 = descended(v1, s1, minus_lr, decay)
            v2 = descended(v2, s2, minus_lr, decay)
            v3 = descended(v3, s3, minus_lr, decay)
        elif SECOND:
            v0, v1, v2, v3 = q0, q1, q2, q3
        else:
            v0, v1, v2, v3 = s0, s1, s2, s3
    weights = (v0, v1, v2, v3)
    _store(weights, address, stride, call, span, 1, TYPE, STOCHASTIC, ROWS, COLUMNS, ON)
    if BUFFERS > 0 and OPERATION == "update":
        kept = (k0, k1, k2, k3)
        _store(
            *(kept, buffer, buffer_stride, call, span),
            *(2, BUFFER_TYPE, STOCHASTIC, ROWS, COLUMNS, ON),
        )
        if BUFFERS > 1:
            kept = (m0, m1, m2, m3)
            _store(
                *(kept, second_buffer, buffer_stride, call, span),
                *(3, BUFFER_TYPE, STOCHASTIC, ROWS, COLUMNS, ON),
            )
