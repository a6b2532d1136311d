"""ZO-AdaMU as a torch optimizer: the momentum is in the direction that is evaluated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState

from ..engine.arithmetic import Number
from .buffered import Buffered
from .common import check_count, check_fraction, check_positive


class ZOAdaMU(Buffered):
    r"""Adaptive perturbation with simulated momentum (arXiv 2312.15184).

    The closure is evaluated on both sides along a direction d that goes on from the last one, m::

        z' = sqrt(alpha) u_0          z'' = m + sqrt(1 - alpha) u_1          u_0, u_1 ~ N(0, I)
        d = beta1 z' + (1 - beta1) z''
        p = (L(theta + mu d) - L(theta - mu d)) / (2 mu)
        v = beta2 z'^2 + (1 - beta2) z''^2
        theta <- theta (1 - lr weight_decay) - lr p d / sqrt(v + eps)
        m <- d

    alpha, beta1 and beta2 are 1 for the first ``warmup`` steps (d is then u_0, and a step goes by
    its signs), fall to ``ends`` along half a cosine until step ``anneal``, and stay there. One
    number is kept for each weight, ``state[p]["m"]``.

    Deviations from the authors' code: the update is along the direction that was evaluated, where
    theirs draws another. The schedule counts steps that were skipped, too. A step uses two
    directions of the stream. ``lr`` has a default of ours.

    Args:
        params: as for :class:`AdaMeZO`.
        lr: step size, by group.
        ends: (alpha, beta1, beta2) after the annealing, each in [0, 1].
        warmup: how many steps they are 1.
        anneal: the step from which on they are ``ends``.
        eps: inside the root, by group.
        zo_eps: the perturbation scale mu.
        common: as for :class:`MeZO`, and ``buffer_dtype``: "float32" or "bfloat16", by group.
            ``capturable`` is refused: its direction is scheduled on the host.

    Attributes:
        measured (tuple[float]): p of the last step; empty if it failed.
    """

    rule = "adamu"
    buffers = {"m": 0.0}
    shared_options = (*Buffered.shared_options, "ends", "warmup", "anneal")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-6,
        ends: tuple[float, float, float] = (0.5, 0.9, 0.01),
        *,
        warmup: int = 1024,
        anneal: int = 16000,
        eps: float = 1e-8,
        zo_eps: float = 1e-3,
        **common: Any,
    ) -> None:
        own = dict(lr=lr, ends=ends, warmup=warmup, anneal=anneal, eps=eps, zo_eps=zo_eps)
        super().__init__(params, own, common)

    @staticmethod
    def annealed(step: int, options: dict[str, Any]) -> list[float]:
        """alpha, beta1 and beta2 at a step, counted from 0."""
        begin, end = options["warmup"], options["anneal"]
        passed = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
        left = (1 + math.cos(math.pi * passed)) / 2
        return [last + (1 - last) * left for last in options["ends"]]

    def _direction_numbers(self, first: PhiloxState, options: dict[str, Any]) -> Sequence[float]:
        return self._numbers(0.0, (), first.counter, {}, options)[:4]

    @staticmethod
    def _numbers(
        p: Number, others: Sequence[Number], counter: Number, schedule: dict[str, Number],
        group: dict[str, Any],
    ) -> Sequence[Number]:  # fmt: skip
        alpha, beta1, beta2 = ZOAdaMU.annealed(counter // 2, group)
        directions = math.sqrt(alpha), math.sqrt(1 - alpha), beta1, 1 - beta1
        return [*directions, beta2, 1 - beta2, p]

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        if options["capturable"]:
            raise ValueError(
                "ZOAdaMU cannot do capturable=True: the direction of its perturbations is "
                "scheduled on the host"
            )
        for name, value in zip(("alpha", "beta1", "beta2"), options["ends"], strict=True):
            check_fraction(f"{name} of ends", value, closed=True)
        check_count("warmup", options["warmup"], least=0)
        check_count("anneal", options["anneal"], least=options["warmup"])
        # Inside a root that the squares of two normals may leave at 0.
        check_positive("epsilon value", options["eps"])
