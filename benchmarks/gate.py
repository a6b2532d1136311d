"""No speed without correctness: the native kernels' bits against the reference's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from adamezo_kernels import ops
from adamezo_kernels.plan import Plan
from adamezo_kernels.stream import PhiloxState

# Odd sizes, so that vector bodies and tails both run; several tensors, so several parameters.
_SIZES = (4099, 1, 37)
_HORIZON = 10


class GateError(RuntimeError):
    """A backend's bits differ from the reference's, so its speed means nothing."""


def gate(types: Iterable[torch.dtype], *, backend: str, label: str = "") -> None:
    """Raises GateError unless `backend` gives the reference's bits in every timed operation."""
    for dtype in types:
        for name, got, expected in zip(
            ("sample_", "perturb_", "update_ (AdaMeZO)", "update_ (v = 1)"),
            _results(dtype, backend),
            _results(dtype, "reference"),
            strict=True,
        ):
            wrong = sum(
                int((_bits(a) != _bits(b)).sum()) for a, b in zip(got, expected, strict=True)
            )
            if wrong:
                raise GateError(
                    f"{name} of backend {label or backend} in {dtype}: {wrong} of {sum(_SIZES)} "
                    "elements differ from the reference's bits, expected none. No speed is "
                    "measured: run the tests of the kernels first"
                )


def _results(dtype: torch.dtype, backend: str) -> list[list[Tensor]]:
    states = [PhiloxState(0x1234_5678_9ABC_DEF0, 40 - age) for age in range(_HORIZON)]
    first = [0.3 * 0.7**age * (-1) ** age * 5 for age in range(_HORIZON)]
    second = [0.1 * 0.9**age * 25 for age in range(_HORIZON)]
    generator = torch.Generator().manual_seed(0)
    weights = [(0.02 * torch.randn(n, generator=generator)).to(dtype) for n in _SIZES]

    sampled = [torch.empty_like(w) for w in weights]
    for index, out in enumerate(sampled):
        ops.sample_(out, states[0], parameter=index, backend=backend)
    perturbed = [w.clone() for w in weights]
    ops.perturb_(Plan(perturbed), states[0], 1e-3, backend=backend)
    results = [sampled, perturbed]
    for v in (second, None):
        # A learning rate at which the update moves 16-bit weights by many units in the last place.
        updated = [w.clone() for w in perturbed]
        ops.update_(
            Plan(updated),
            states,
            first,
            v,
            lr=1e-2,
            eps=1e-8,
            weight_decay=0.1,
            restore=-1e-3,
            backend=backend,
        )
        results.append(updated)
    return results


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
