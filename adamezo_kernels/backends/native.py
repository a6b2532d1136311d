"""The compiled CPU kernels, for the instruction sets of this machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor  # before _native: both then share torch's OpenMP runtime

from ..call import Call
from ..plan import Launch
from ..rules import RULES
from ..stream import DISTRIBUTIONS as ALL_DISTRIBUTIONS
from ..stream import ROUNDINGS, kind_of
from ..terms import OPERATIONS

try:
    from .. import _native

    # They are called by their numbers, so a module of other sources would run another, or none.
    for _what, _here in (("rules", RULES), ("distributions", ALL_DISTRIBUTIONS)):
        _built: list[str] = getattr(_native, _what, list)()
        if _built != list(_here):
            raise ImportError(
                f"it was built with the {_what} {_built}, and Python has {list(_here)}"
            )
    _import_error: ImportError | None = None
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _import_error = error

NAME = "native"

compiled: Any = _native
"""The compiled module, for the backend that shares it; None where it cannot be imported."""

DISTRIBUTIONS: tuple[str, ...] = ("exact", "rademacher", "lowrank", "flipout")

_RULES = {name: place for place, name in enumerate(RULES)}

_forced_instruction_set: str | None = None


def availability() -> tuple[bool, str]:
    """Whether the compiled module could be imported, and one line on why (not)."""
    if _native is None:
        return False, (
            f"the compiled module cannot be imported ({_import_error}). Install adamezo again "
            "where a C++17 compiler is found (`pip install --force-reinstall --no-deps .`), and "
            "without ADAMEZO_NATIVE=OFF"
        )
    return True, f"compiled by {build_report()['compiler']}, uses {instruction_set()}"


def supports(device: torch.device) -> bool:
    return device.type == "cpu"


@functools.cache
def build_report() -> dict[str, str]:
    """The version, compiler and CUDA toolkit that the module was built with."""
    return _native.build_report()


def cuda_report() -> dict[str, int | str]:
    """The versions and devices that the CUDA runtime linked into the module finds here."""
    return _native.cuda_report()


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine can run, the fastest first."""
    return tuple(_native.instruction_sets()) if _native is not None else ()


def instruction_set() -> str:
    """The one that is used: of :func:`use_isa`, else of ``ADAMEZO_ISA``, else the fastest.

    Raises:
        RuntimeError: a name that this machine cannot run.
    """
    name = _forced_instruction_set or os.environ.get("ADAMEZO_ISA") or None
    able = instruction_sets()
    if name is None:
        return able[0]
    if name not in able:
        raise RuntimeError(
            f"the instruction set {name!r} was asked for (ADAMEZO_ISA or use_isa), and this "
            f"machine can run {', '.join(able)}"
        )
    return name


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels with one instruction set, for tests and benchmarks. Not thread-safe."""
    global _forced_instruction_set
    before, _forced_instruction_set = _forced_instruction_set, name
    try:
        instruction_set()
        yield
    finally:
        _forced_instruction_set = before


def job(
    call: Call,
    launch: Launch,
    table: Tensor,
    words: Tensor,
    *,
    distribution: str | None = None,
    count: int | None = None,
    carried: int = 0,
) -> Any:
    """The Job of a call on one launch, for the compiled module; ``table`` and ``words`` are on the
    device that runs it. ``distribution``: if not the call's; ``count``: of what the table counts,
    if not elements; ``carried``: how many words are on the host, from where a launch on another
    device carries them."""
    terms = call.terms
    segments, elements, dtype, buffer_dtype = launch.kind
    distribution, rank = kind_of(distribution or call.distribution)
    # Positional: the names of so many arguments cost as much as a kernel of a few hundred elements.
    return compiled.Job(
        OPERATIONS.index(call.operation),
        ALL_DISTRIBUTIONS.index(distribution),
        rank,
        table.data_ptr(),
        segments,
        elements if count is None else count,
        dtype,
        terms.key,
        terms.offset,
        words.data_ptr(),
        terms.horizon,
        terms.with_second,
        _RULES[terms.rule],
        buffer_dtype,
        call.scale,
        call.eps,
        ROUNDINGS.index(call.rounding),
        carried,
    )


def run(call: Call) -> None:
    isa, threads = instruction_set(), torch.get_num_threads()
    for launch in call.plan.launches:
        for part, kind in launch.by_kernel(call.distribution):
            made = job(call, part, part.table, call.terms.words, distribution=kind)
            compiled.run(made, isa, threads)
        mark_written(launch)


def mark_written(launch: Launch) -> None:
    """Tells autograd that a kernel has written the launch's tensors."""
    torch.autograd.graph.increment_version(launch.counted)
