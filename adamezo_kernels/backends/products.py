"""Products with perturbed weights by Triton: the launch of the kernel in _triton_products.py."""

from __future__ import annotations

import functools
import importlib
import struct
from typing import Any

import torch
from torch import Tensor

from ..stream import PhiloxState
from ..terms import Terms
from . import triton
from .cuda import Place

DISTRIBUTIONS = ("exact", "fast", "rademacher")
"""Those of full directions. A product with a low-rank one needs no displaced weights."""

_ROWS, _OUT, _INNER = (16, 64, 128), 64, 32
TILES = {
    "float32": ((16, 32), 64, 16),
    "bfloat16": (_ROWS, _OUT, _INNER),
    "float16": (_ROWS, _OUT, _INNER),
}
"""By type: the rows of y of a program, of which the first is taken that x fits in; its columns of
y; and the columns of x for which it displaces weights at a time. Each program displaces its weights
anew, so that more rows than the last number take several times the random numbers. float32 is
multiplied without tensor cores, whose numbers are shorter, and in more registers."""


@functools.cache
def kernel() -> Any:
    return importlib.import_module("._triton_products", __package__).run


def serves(weight: Tensor, distribution: str) -> bool:
    """Whether the kernel takes this weight, which a Plan has taken."""
    return (
        distribution in DISTRIBUTIONS
        and distribution in triton.DISTRIBUTIONS
        and weight.numel() > 0
        and weight.stride(1) == 1
    )


def run(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    parameter: int,
    each: list[tuple[PhiloxState, float]],
    distribution: str,
    bias: Tensor | None,
) -> None:
    """Writes y of shape (N, rows, out) for x of (N, rows, in)."""
    rows, (count, inner) = x.shape[1], weight.shape
    if not y.numel():
        return
    place = (triton.Interpreter if triton.INTERPRETED else Place)(weight.device)
    kind = str(weight.dtype).removeprefix("torch.")
    heights, width, _ = TILES[kind]
    tile = next((height for height in heights if rows <= height), heights[-1])
    programs = len(each) * -(-rows // tile) * -(-count // width)
    with place.guard:
        if place.capturing():
            raise RuntimeError("a capture would keep the directions of this call at every replay")
        words = place.copy(words_of(each))
        start(
            (programs,),
            *(_bits(t) for t in (y, x.contiguous(), weight, weight if bias is None else bias)),
            *(words, len(each), rows, count, inner, weight.stride(0)),
            *(count if bias is not None and bias.dim() == 2 else 0, parameter),
            **constants(distribution, kind, bias is not None, inner, tile, triton._on()),
            **options(triton._warp(weight.device)),
        )


def words_of(each: list[tuple[PhiloxState, float]]) -> Tensor:
    """int32 (4, N): the directions, the low and the high words of the keys, the bits of scales."""
    scales = Terms.of_counters(0, [0] * len(each), [scale for _, scale in each]).first
    counters = struct.pack(f"={len(each)}I", *(state.counter for state, _ in each))
    keys = torch.tensor([triton.key_words(state.key) for state, _ in each], dtype=torch.int32)
    directions = torch.frombuffer(bytearray(counters), dtype=torch.int32)
    return torch.stack([directions, *keys.T, scales.view(torch.int32)])


def constants(
    distribution: str, type: str, bias: bool, inner: int, rows: int, on: str
) -> dict[str, Any]:
    """The constants that the kernel is compiled for."""
    return {
        "DISTRIBUTION": distribution,
        "TYPE": type,
        "BIAS": bias,
        "ALIGNED": inner % 4 == 0,
        "ROWS": rows,
        "OUT": TILES[type][1],
        "INNER": TILES[type][2],
        "ON": on,
    }


def options(warp: int) -> dict[str, Any]:
    """Without fusion, which would change displaced weights; products of tiles have it anyway."""
    return {**triton.options(warp), "num_stages": 2}


def start(grid: tuple[int], /, *arguments: Any, **constants: Any) -> None:
    kernel()[grid](*arguments, **constants)


def _bits(tensor: Tensor) -> Tensor:
    """bfloat16 as the kernel takes it."""
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
