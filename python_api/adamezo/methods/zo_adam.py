"""ZO-Adam as a torch optimizer: Adam on estimated gradients, with both moments stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.arithmetic import Number, quotient, steps_to_one
from .buffered import Buffered
from .common import check_betas, check_positive


class ZOAdam(Buffered):
    r"""Adam (arXiv 1412.6980) on the estimate p z, as MeZO's paper has it for comparison (arXiv
    2305.17333, appendix B): what AdaMeZO gives without memory, up to its horizon.

    With p the projected gradient of step t = 1, 2, ... along z::

        m <- beta1 m + (1 - beta1) p z            v <- beta2 v + (1 - beta2) p^2 z^2
        m_hat = m / (1 - beta1^t)                 v_hat = v / (1 - beta2^t)
        theta <- theta (1 - lr weight_decay) - lr m_hat / (sqrt(v_hat) + eps)

    Two numbers are kept for each weight, ``state[p]["m"]`` and ``state[p]["v"]``. With the same
    directions and betas, ``AdaMeZO(normalization="bias_corrected")`` steps alike for as long as its
    horizon holds all steps.

    Deviations: t counts the steps of the parameter group, also for weights that joined it later.

    Args:
        params: as for :class:`AdaMeZO`.
        lr: step size, by group.
        betas: (beta1, beta2) in [0, 1), by group.
        eps: added to the root, by group.
        zo_eps: the perturbation scale mu.
        common: as for :class:`MeZO`, and ``buffer_dtype``: "float32" or "bfloat16", by group.

    Attributes:
        measured (tuple[float]): p of the last step; empty if it failed.
    """

    rule = "adam"
    buffers = {"m": 0.0, "v": 0.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        zo_eps: float = 1e-3,
        **common: Any,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, zo_eps=zo_eps), common)

    def unit_length(self, group: dict[str, Any]) -> float | None:
        """With beta2 = 0 the v of a weight is one gradient's square, which is often near 0 beside
        its m."""
        return None if group["betas"][1] == 0 else 1.0

    @staticmethod
    def _numbers(
        p: Number, others: Sequence[Number], counter: Number, schedule: dict[str, Number],
        group: dict[str, Any],
    ) -> Sequence[Number]:  # fmt: skip
        beta1, beta2 = group["betas"]
        corrections = [quotient(1.0, schedule[name]) for name in ("of_m", "of_v")]
        return [beta1, (1 - beta1) * p, beta2, (1 - beta2) * p * p, *corrections]

    @staticmethod
    def _scheduled(step: int, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"of_m": 1 - beta1**step, "of_v": 1 - beta2**step}

    @staticmethod
    def _settled(group: dict[str, Any]) -> int:
        return max(map(steps_to_one, group["betas"]))

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        check_betas(options["betas"])
        check_positive("epsilon value", options["eps"])
        self._check_schedule(options, "betas")
