"""The operations by Triton, which compiles them where they run, on NVIDIA or AMD, without nvcc.

There is one kernel (_triton_kernels.py), compiled again for each operation, distribution, element
type, rounding, rule and type of its buffers and for nothing else: every number of a call is a
run-time argument. A launch has a program for each window of a plan's segments. Besides the weights
a program reads the same tensors as in cuda.py: the table of segments, copied once for each plan and
stream, and one small tensor with the call's directions, coefficients and scalars.

A second kernel (_triton_tiles.py) does the matrices of a call with low-rank directions, in tiles of
rows and columns; the first one does the vectors of the call, which have exact normals. The few
layouts that have no tiles (tiling.py) are left to the reference.

The sizes of windows and tiles are fixed, not tuned by trial runs: these would change the weights.

With TRITON_INTERPRET=1 in the environment of the process, Triton's interpreter runs the kernel on
CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import rules
from ..call import Call
from ..plan import Launch, Segment
from ..rules import RULES
from ..stream import PhiloxState, kind_of
from ..terms import Terms
from . import reference
from .cuda import Place, failed, words_for
from .native import mark_written
from .tiling import parts, tile_constants, tile_threads, tiles_of

NAME = "triton"


def distributions(hip: str | None) -> tuple[str, ...]:
    """The distributions for torch's version of HIP, or None: ``fast`` needs instructions of NVIDIA,
    whose errors are documented."""
    return ("exact", "rademacher", "lowrank") if hip else ("exact", "fast", "rademacher", "lowrank")


DISTRIBUTIONS = distributions(torch.version.hip)

OLDEST = (3, 4)
"""The oldest Triton version that the kernel was compiled with."""

THREADS = 128
"""The number of threads of a program."""

WINDOWS = {"sample": 2048, "perturb": 2048, "update": 1024, "moment": 1024}
"""The number of elements of a program, by operation. More elements a thread share the work that is
done once; but the sums of an update are four registers an element, so that sixteen elements would
save 4 % of the instructions and leave 16 warps on a multiprocessor of an H100, where eight leave
28."""

MOST_PROGRAMS = 2**23
"""The most programs of one launch, as AMD counts a launch's threads in 32 bits."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FIRST = 11  # the column of the table that counts the elements before a segment
_Table = tuple[Tensor, int]
_Counted = Callable[[Segment], int]


# --- whether it can run ---------------------------------------------------------------------------


@functools.cache
def availability() -> tuple[bool, str]:
    """Whether the kernel can run in this process with the bits that are promised, and one line on
    why (not)."""
    try:
        import triton

        found = f"Triton {triton.__version__}"
        if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
            return False, (
                f"{found} is older than {'.'.join(map(str, OLDEST))}: install a newer torch, which "
                "brings one"
            )
        kernels()
    except Exception as error:  # a broken installation may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return False, f"there is no Triton here ({error}): `pip install triton`"
        return False, (
            f"Triton cannot be imported ({type(error).__name__}: {error}): install the one that "
            "belongs to this torch again"
        )
    if INTERPRETED:
        if not _interpreter_rounds_once():
            return False, (
                f"the interpreter of {found} rounds an fma twice, which changes bits: install "
                "Triton 3.9 or later, or unset TRITON_INTERPRET"
            )
        return True, f"{found}, interpreted on the CPU as TRITON_INTERPRET is set; slow"
    if not torch.cuda.is_available():
        return False, f"{found}, but torch {torch.__version__} finds no GPU"
    try:
        target = triton.runtime.driver.active.get_current_target()
        fuses = can_fuse(target)
    except Exception as error:
        return False, f"{found} has no working driver ({type(error).__name__}: {error})"
    if fuses:
        return False, (
            f"{found} fuses multiplications and additions for {target.backend} whatever it is "
            "told, which changes bits: install another version"
        )
    return True, f"{found} for {target.backend}:{target.arch}"


@functools.cache
def kernels() -> Any:
    """The module of the first kernel, which imports Triton."""
    return importlib.import_module("._triton_kernels", __package__)


@functools.cache
def tiles() -> Any:
    """The module of the kernel for tiles."""
    return importlib.import_module("._triton_tiles", __package__)


def can_fuse(target: Any) -> bool:
    """Whether the compiler for ``target`` would fuse although a launch says that it must not."""
    from triton.compiler import make_backend

    return bool(make_backend(target).parse_options({"enable_fp_fusion": False}).enable_fp_fusion)


def _interpreter_rounds_once() -> bool:
    # (1 + 2^-12)^2 - 1 - 2^-11 is 2^-24, and 0 where the product is rounded first.
    values = torch.tensor([1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11, 0.0])
    kernels().round_fma[(1,)](values)
    return values[3].item() == 2.0**-24


def supports(device: torch.device) -> bool:
    return device.type == ("cpu" if INTERPRETED else "cuda")


# --- launches -------------------------------------------------------------------------------------


class Interpreter(Place):
    """The Place of an interpreted kernel, in host memory."""

    stream = 0
    guard = nullcontext()

    def __init__(self, device: torch.device) -> None:
        pass

    def capturing(self) -> bool:
        return False

    def copy(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    keep = copy


def run(call: Call) -> None:
    name, rank = kind_of(call.distribution)
    for launch in call.plan.launches:
        if not launch.elements:
            continue
        place = (Interpreter if INTERPRETED else Place)(launch.device)
        try:
            with place.guard:
                # The references last until the launches: after them their memory may be reused.
                words = words_for(call.terms, place)
                if name != "lowrank":
                    _run_windows(call, name, launch, place, words)
                else:
                    for kind, part in parts(launch, call.terms.offset).items():
                        if kind == "windows":
                            _run_windows(call, "exact", part, place, words)
                        elif kind == "tiles":
                            _run_tiles(call, rank, part, place, words)
                        else:
                            reference.run(call.on(call.plan._of(part.segments)))
        except Exception as error:
            raise RuntimeError(
                f"{failed(call, launch)}: {type(error).__name__}: {error}. {availability()[1]}"
            ) from error
        mark_written(launch)


def _run_windows(call: Call, distribution: str, launch: Launch, place: Any, words: Tensor) -> None:
    window = window_of(call.operation, call.terms.rule)
    table = _table(launch, place, window, functools.partial(windows_of, window=window))
    fixed = _constants(call, launch, distribution)
    for arguments in _arguments(call, launch, table, words):
        start(*arguments, **fixed, **options(_warp(launch.device)))


def _run_tiles(call: Call, rank: int, launch: Launch, place: Any, words: Tensor) -> None:
    table = _table(launch, place, 0, tiles_of)
    fixed = tile_constants(_constants(call, launch, "exact"))
    threads = tile_threads(call.terms.rule)
    for arguments in _arguments(call, launch, table, words):
        start_tiles(
            *arguments,
            rank,
            float_bits(1 / math.sqrt(rank), 0.0)[0],
            **fixed,
            **options(_warp(launch.device), threads),
        )


def _arguments(call: Call, launch: Launch, table: _Table, words: Tensor) -> Iterator[list[Any]]:
    """The grid and the arguments that both kernels have, for one launch of them after another."""
    (columns, programs), terms = table, call.terms
    for begin in range(0, programs, MOST_PROGRAMS):
        yield [
            (min(programs - begin, MOST_PROGRAMS),),
            *(columns, words, len(launch.segments), terms.horizon, terms.offset, begin),
            *key_words(terms.key),
            *float_bits(call.scale, call.eps),
        ]


def _constants(call: Call, launch: Launch, distribution: str) -> dict[str, Any]:
    return constants(
        call.operation,
        distribution,
        _TYPES[launch.dtype],
        _TYPES[launch.buffer_dtype],
        second=call.terms.with_second,
        stochastic=call.rounding == "stochastic",
        rule=call.terms.rule,
        on=_on(),
    )


def constants(
    operation: str,
    distribution: str,
    dtype: str,
    buffer_dtype: str,
    *,
    second: bool,
    stochastic: bool,
    rule: str,
    on: str,
) -> dict[str, Any]:
    """The constants that the kernel is compiled for. ``on``: "cuda", "hip" or "interpreter"."""
    of = RULES[rule]
    traced = kernels().NVIDIA_RULES if on == "cuda" else kernels().RULES
    direction = of.direction or rules.default_direction
    return {
        "OPERATION": operation,
        "DISTRIBUTION": distribution,
        "TYPE": dtype,
        "SECOND": second,
        "STOCHASTIC": stochastic,
        "DIRECTIONS": of.directions,
        "BUFFERS": of.buffers,
        "DIRECTION": traced[direction.__name__],
        "STEP": of.step and traced[of.step.__name__],
        "BUFFER_TYPE": buffer_dtype if of.buffers else "",
        "WINDOW": window_of(operation, rule),
        "ON": on,
    }


def window_of(operation: str, rule: str) -> int:
    """The window size: a rule's directions and buffers take registers in a perturbation too."""
    return WINDOWS[operation if rule == "moments" else "update"]


def windows_of(s: Segment, window: int) -> int:
    """The most windows of a segment: where they begin depends on the offset of a call, and the
    program of a window without elements ends at once."""
    return s.rows * ((s.row_length + 2 * window - 2) // window)


def table_of(launch: Launch, count: _Counted) -> _Table:
    """A kernel's table of segments on the host, and their number of programs: the launch's table,
    but its column `first` counts programs, of which ``count`` gives those of a segment."""
    table = launch.table.clone()
    programs = 0
    for row, s in zip(table, launch.segments, strict=True):
        row[_FIRST] = programs
        programs += count(s) if s.elements else 0
    return table, programs


def _table(launch: Launch, place: Any, size: int, count: _Counted) -> _Table:
    """That table on the device, copied once for each stream that it is used on."""
    # The dict in which a Launch, which is frozen, stores its cached properties.
    tables: dict[tuple[int, int], _Table]
    tables = vars(launch).setdefault("triton_tables", {})
    found = tables.get((size, place.stream))
    if found is None and place.capturing():
        # As in cuda.py, a graph would repeat the copy at each replay.
        found = next((t for (of, _), t in tables.items() if of == size), None)
        if found is None:
            raise RuntimeError("a capture cannot copy the table: run the same call once before")
    if found is None:
        table, programs = table_of(launch, count)
        found = tables[size, place.stream] = (place.keep(table), programs)
    return found


def key_words(key: int) -> tuple[int, int]:
    """The low and the high word of a key, as the signed integers that Triton takes."""
    low, high = ((key >> shift & 0xFFFFFFFF ^ 2**31) - 2**31 for shift in (0, 32))
    return low, high


def float_bits(a: float, b: float) -> list[int]:
    """The bits of two numbers rounded to float32, as signed integers."""
    return Terms.of([PhiloxState(0, 0)], [a], [b]).words[1:3].tolist()


def options(warp: int, threads: int = THREADS) -> dict[str, Any]:
    """The compiler options of a kernel, for warps of ``warp`` threads."""
    return {"num_warps": threads // warp, "enable_fp_fusion": False}


def start(grid: tuple[int], /, *arguments: Any, **constants: Any) -> None:
    kernels().run[grid](*arguments, **constants)


def start_tiles(grid: tuple[int], /, *arguments: Any, **constants: Any) -> None:
    tiles().run[grid](*arguments, **constants)


def _on() -> str:
    return "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"


@functools.cache
def _warp(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if torch.version.hip else 32
