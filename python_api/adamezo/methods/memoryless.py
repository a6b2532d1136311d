"""What methods share that step along the directions of one step: their options, and that step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState, Plan, update_

from ..optimizer import ZerothOrder

COMMON: dict[str, Any] = dict(
    weight_decay=0.0,
    distribution="exact",
    perturbation="inplace",
    rounding="stochastic",
    nonfinite="skip",
    max_skipped=20,
    maximize=False,
    fused=None,
    capturable=False,
    seed=None,
    differentiable=False,
    model=None,
)
"""Options of every method, with the meaning and the defaults that :class:`AdaMeZO` has."""


class Memoryless(ZerothOrder):
    """Base of methods whose update is coefficients in front of directions of the step itself.

    Args:
        params: as for :class:`AdaMeZO`.
        own: the method's own options and their values, ``lr`` and ``zo_eps`` among them.
        common: those of COMMON that are to have another value.
    """

    def __init__(self, params: ParamsT, own: dict[str, Any], common: dict[str, Any]) -> None:
        unknown = sorted(common.keys() - COMMON.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(unknown)}, expected some of "
                f"{', '.join([*own, *COMMON])}"
            )
        options: dict[str, Any] = {**own, **COMMON, **common}
        differentiable, model = options.pop("differentiable"), options.pop("model")
        super().__init__(params, options, differentiable, model)

    def _step_along(
        self,
        group: dict[str, Any],
        plan: Plan,
        directions: Sequence[PhiloxState],
        coefficients: Sequence[float],
        restore: float,
        backend: str,
    ) -> None:
        """``theta <- theta (1 - lr weight_decay) - lr sum_q coefficients[q] z_q``, in one pass.

        ``directions`` are in the order of the probes: what is to be restored is of the last one.
        """
        sign = -1 if group["maximize"] else 1
        update_(
            plan,
            directions[::-1],
            [sign * value for value in coefficients[::-1]],
            None,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            restore=restore,
            distribution=group["distribution"],
            rounding=group["rounding"],
            backend=backend,
        )
        group["steps"] += 1


def directions_from(first: PhiloxState, count: int) -> list[PhiloxState]:
    """``count`` directions, of which ``first`` is the first."""
    return [first._replace(counter=first.counter + q) for q in range(count)]


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless it is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Invalid {name}: {value!r}, expected an integer of at least {least}")
