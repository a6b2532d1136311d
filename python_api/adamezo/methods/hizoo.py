"""HiZOO as a torch optimizer: shorter perturbations and steps where the loss is curved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState

from ..engine.arithmetic import Number, magnitude, quotient, two_sided
from ..engine.base import Probe
from .buffered import Buffered
from .common import check_fraction


class HiZOO(Buffered):
    r"""Zeroth-order steps preconditioned by an estimate D of the Hessian's diagonal (arXiv
    2402.15173, algorithm 1).

    A step evaluates the closure at :math:`\theta` and on both sides along
    :math:`d = z / \sqrt D`, where D is 1 at first::

        p = (L(theta + mu d) - L(theta - mu d)) / (2 mu)
        c = |L(theta + mu d) + L(theta - mu d) - 2 L(theta)| / (2 mu^2)
        D <- (1 - alpha) D + alpha c D z^2
        theta <- theta (1 - lr weight_decay) - lr p z / sqrt(D)          with the new D

    One number is kept for each weight, ``state[p]["curvature"]``.

    Deviations from the authors' code: D is float32 unless ``buffer_dtype`` says otherwise, and
    stays in [1e-4, 1e4], so that no curvature can make a perturbation infinite. With the published
    alpha of 1e-8 D moves where c z^2 is above 6: smaller changes are below its last place, and so
    is the decay by alpha alone. In 16 bits, as released, it never moves, and the method is MeZO
    with an evaluation wasted. alpha is constant.

    Args:
        params: as for :class:`AdaMeZO`.
        lr: step size, by group.
        alpha: how fast D follows the curvature, in [0, 1), by group.
        zo_eps: the perturbation scale mu.
        common: as for :class:`MeZO`, and ``buffer_dtype``: "float32" or "bfloat16", by group.

    Attributes:
        measured (tuple[float, float]): p and c of the last step; empty if it failed.
        losses (tuple[float, float, float]): of the last step: at theta, +mu d and -mu d.
    """

    rule = "hizoo"
    buffers = {"curvature": 1.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-6,
        alpha: float = 1e-8,
        *,
        zo_eps: float = 1e-3,
        **common: Any,
    ) -> None:
        super().__init__(params, dict(lr=lr, alpha=alpha, zo_eps=zo_eps), common)

    def _probes(self, first: PhiloxState, options: dict[str, Any]) -> list[Probe]:
        mu = options["zo_eps"]
        return [(first, 0.0), (first, mu), (first, -mu)]

    def _measure(self, losses: Sequence[Number], options: dict[str, Any]) -> tuple[Number, ...]:
        start, plus, minus = losses
        mu = options["zo_eps"]
        curvature = quotient(magnitude(plus + minus - 2 * start), 2 * mu * mu)
        return two_sided(plus, minus, mu), curvature

    @staticmethod
    def _numbers(
        p: Number, others: Sequence[Number], counter: Number, schedule: dict[str, Number],
        group: dict[str, Any],
    ) -> Sequence[Number]:  # fmt: skip
        (curvature,) = others
        return [-group["alpha"], group["alpha"] * curvature, p]

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        check_fraction("alpha", options["alpha"])
