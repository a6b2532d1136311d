"""FZOO as a torch optimizer: one-sided differences over the spread of their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState

from ..engine.arithmetic import Number, alike, quotient, square_root, total, where
from ..engine.base import Probe
from .common import check_count, directions_from
from .memoryless import Memoryless


class FZOO(Memoryless):
    """Steps of a length that the spread of the losses sets (arXiv 2506.09034).

    A step evaluates the closure at theta, and on one side only along N directions of signs::

        l_0 = L(theta)        l_i = L(theta + mu u_i)
        sigma^2 = sum_i (l_i - mean l)^2 / (N - 1)         over i = 1 ... N
        theta <- theta (1 - lr weight_decay) - lr / (N mu sigma) sum_i (l_i - l_0) u_i

    Where all l_i are equal there is no scale: such a step has a sum of 0, and moves the weights by
    their decay alone.

    With ``perturbation="regenerated"`` and a closure of :func:`adamezo.batched` all N + 1
    evaluations are one forward; ``distribution="flipout:N"`` then has normals that all share.

    Deviations: the authors' code has mu inside its learning rate (lr / mu = 5e-5 there) and divides
    by N in sigma.

    Args:
        params: as for :class:`AdaMeZO`.
        lr: step size, by group.
        queries: N, how many directions a step has, at least 2.
        zo_eps: the perturbation scale mu. Steps are proportional to lr / mu. With the paper's
            1e-4 runs in bfloat16 ended far behind: take 1e-3 where products round to it, 1e-2
            where weights do, and an lr that is higher by about the same factor (measured: 5.6
            to 18 for a factor of 10).
        common: as for :class:`MeZO`, but that ``distribution`` is ``"rademacher"`` if not given.

    Attributes:
        measured (tuple[float, ...]): (l_i - l_0) / (mu sigma) for i = 1 ... N of the last step,
            zeros where sigma was 0; empty if it failed.
        losses (tuple[float, ...]): l_0, l_1, ... of the last step.
    """

    shared_options = (*Memoryless.shared_options, "queries")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-9,
        queries: int = 8,
        *,
        zo_eps: float = 1e-4,
        **common: Any,
    ) -> None:
        common.setdefault("distribution", "rademacher")
        super().__init__(params, dict(lr=lr, queries=queries, zo_eps=zo_eps), common)

    def _probes(self, first: PhiloxState, options: dict[str, Any]) -> list[Probe]:
        directions = directions_from(first, options["queries"])
        return [(first, 0.0), *((u, options["zo_eps"]) for u in directions)]

    def _measure(self, losses: Sequence[Number], options: dict[str, Any]) -> tuple[Number, ...]:
        start, *others = losses
        mean = quotient(total(others), len(others))
        apart = [loss - mean for loss in others]
        sigma = square_root(quotient(total(x * x for x in apart), len(others) - 1))
        unit = options["zo_eps"] * sigma
        flat = (unit == 0) | alike(others)  # of equal losses sigma may be a rounding error
        unit = where(flat, 1.0, unit)
        return tuple(where(flat, 0.0, loss - start) / unit for loss in others)

    def unit_length(self, group: dict[str, Any]) -> float | None:
        """The mean of N directions, each of about 1 / mu. Of two losses sigma is often near 0, and
        steps have no typical length."""
        if group["queries"] == 2:
            return None
        return 1 / (float(group["zo_eps"]) * math.sqrt(group["queries"]))

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        check_count("queries", options["queries"], least=2)
