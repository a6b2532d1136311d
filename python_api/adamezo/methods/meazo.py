"""MEAZO as a torch optimizer: steps whose size one scalar adapts, for all weights alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.arithmetic import Number, square_root, steps_to_one
from .common import check_fraction
from .memoryless import Memoryless


class MEAZO(Memoryless):
    """MeZO over the root mean square of the projected gradients so far (arXiv 2605.03869).

    With p the projected gradient of step t = 1, 2, ... along z, and s = 0 at first::

        s <- beta s + (1 - beta) p^2            s_hat = s / (1 - beta^t)
        theta <- theta (1 - lr weight_decay) - lr p z / (sqrt(s_hat) + eps)

    Its paper holds that adapting each coordinate adds nothing to this one number.

    Deviations: one direction a step, where the paper also has several. The correction of s has the
    exponent t of Adam, right from step one. ``lr``, ``beta`` and ``eps`` have defaults of ours.

    Args:
        params: as for :class:`AdaMeZO`.
        lr: step size, by group; about what MeZO's is times a typical p.
        beta: of the moving average of p^2, in [0, 1), by group; with ``capturable`` up to 0.99996,
            as the correction is read from a table then.
        eps: added to the root, by group.
        zo_eps: the perturbation scale mu.
        common: as for :class:`MeZO`.

    Attributes:
        measured (tuple[float]): p of the last step; empty if it failed.
    """

    history = {"s": 0.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        beta: float = 0.9,
        eps: float = 1e-8,
        *,
        zo_eps: float = 1e-3,
        **common: Any,
    ) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, eps=eps, zo_eps=zo_eps), common)

    @staticmethod
    def _coefficients(
        measured: Sequence[Number], history: dict[str, Number], schedule: dict[str, Number],
        group: dict[str, Any],
    ) -> Sequence[Number]:  # fmt: skip
        (p,) = measured
        beta = group["beta"]
        history["s"] = beta * history["s"] + (1 - beta) * p * p
        s_hat = history["s"] / schedule["correction"]
        return [p / (square_root(s_hat) + group["eps"])]

    def unit_length(self, group: dict[str, Any]) -> float:
        return 1.0

    @staticmethod
    def _scheduled(step: int, group: dict[str, Any]) -> dict[str, float]:
        return {"correction": 1 - group["beta"] ** step}

    @staticmethod
    def _settled(group: dict[str, Any]) -> int:
        return steps_to_one(group["beta"])

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        check_fraction("beta parameter", options["beta"])
        if not 0.0 < options["eps"] < math.inf:  # all p may be 0
            raise ValueError(f"Invalid epsilon value: {options['eps']}")
        self._check_schedule(options, "beta")

    def _check_state(self, saved: dict[str, Any], group: dict[str, Any], where: str) -> None:
        super()._check_state(saved, group, where)
        s = saved["s"]
        if type(s) is not float or not 0.0 <= s < math.inf:
            raise ValueError(f"{where} is damaged: s is {s!r}, expected a mean of squares")
