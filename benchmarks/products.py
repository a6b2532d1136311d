"""Products in bfloat16 under autocast, on processors with instructions for them and without."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class RoundedInFloat32(TorchFunctionMode):
    """Linear layers multiply numbers that are rounded to bfloat16 in float32, and round the result,
    as such instructions do, but that these add in another order. Where a processor has none of
    them, torch takes five times as long for a product as in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not linear:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return _rounded(*args, **(kwargs or {}))


def _rounded(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, w, b = (None if t is None else t.bfloat16().float() for t in (input, weight, bias))
    return linear(x, w, b).bfloat16()


@functools.cache
def without_instructions() -> bool:
    """Whether this is an x86 processor that has none for products in bfloat16."""
    able = torch.cpu.get_capabilities()
    return not able.get("avx512_bf16", able["architecture"] != "x86_64")


@contextlib.contextmanager
def in_bfloat16(enabled: bool = True) -> Iterator[None]:
    """Autocast to bfloat16 on the CPU, or nothing if not ``enabled``."""
    with contextlib.ExitStack() as stack:
        if enabled:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if without_instructions():
                stack.enter_context(RoundedInFloat32())
        yield
