"""MeZO as a torch optimizer: stochastic gradient descent from forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState

from ..engine.arithmetic import Number, two_sided
from ..engine.base import Probe
from .common import check_count, directions_from
from .memoryless import Memoryless


class MeZO(Memoryless):
    r"""Memory-efficient zeroth-order SGD (arXiv 2305.17333, definition 1 and algorithm 2, n-SPSA).

    A step evaluates the closure at :math:`\theta + \mu z_q` and :math:`\theta - \mu z_q` for n
    directions, and goes along the mean of the n estimates::

        p_q = (L(theta + mu z_q) - L(theta - mu z_q)) / (2 mu)
        theta <- theta (1 - lr weight_decay) - lr / n sum_q p_q z_q

    No gradient is formed: the n directions are regenerated in the one pass that updates. With one
    direction the bits are those of ``AdaMeZO(params, lr, betas=(0.0, 0.0))``.

    Deviations from the authors' code: the mean is taken in one update and not in n; directions
    come from this package's stream; weight decay is decoupled and goes by groups.

    Args:
        params, lr: as for :class:`AdaMeZO`.
        queries: n, how many directions a step has.
        linear_over: None keeps n constant. A number T makes it grow linearly, as the authors' code
            can, from 1 to ``queries`` at step T: ``n = min(max(floor(queries t / T), 1), queries)``
            at step t = 0, 1, ... Steps that were skipped are not counted.
        zo_eps: the perturbation scale mu.
        common: weight_decay, distribution, perturbation, rounding, nonfinite, max_skipped,
            maximize, fused, capturable, seed, differentiable and model, as for :class:`AdaMeZO`.
            ``capturable`` is refused beside ``linear_over``, as a captured step has a fixed number
            of directions.

    Attributes:
        measured (tuple[float, ...]): p_q of the last step in the order of the directions, then
            zeros up to ``queries``; empty if it failed.
        losses (tuple[float, ...]): of the last step: at +mu z_1, -mu z_1, +mu z_2, ...
    """

    shared_options = (*Memoryless.shared_options, "queries", "linear_over")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-6,
        queries: int = 1,
        *,
        linear_over: int | None = None,
        zo_eps: float = 1e-3,
        **common: Any,
    ) -> None:
        own = dict(lr=lr, queries=queries, linear_over=linear_over, zo_eps=zo_eps)
        super().__init__(params, own, common)

    def queries_at(self, step: int, options: dict[str, Any]) -> int:
        """n at a step, counted from 0."""
        most: int = options["queries"]
        over = options["linear_over"]
        return most if over is None else min(max(most * step // over, 1), most)

    def _probes(self, first: PhiloxState, options: dict[str, Any]) -> list[Probe]:
        # The first group has seen all steps.
        count = self.queries_at(self.param_groups[0]["steps"], options)
        mu = options["zo_eps"]
        return [(z, to) for z in directions_from(first, count) for to in (mu, -mu)]

    def _measure(self, losses: Sequence[Number], options: dict[str, Any]) -> tuple[Number, ...]:
        pairs = zip(losses[::2], losses[1::2], strict=True)
        grads = [two_sided(plus, minus, options["zo_eps"]) for plus, minus in pairs]
        # As many numbers in every step, so that records of steps are all alike.
        return (*grads, *[0.0] * (options["queries"] - len(grads)))

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        check_count("queries", options["queries"])
        if options.get("linear_over") is not None:
            check_count("linear_over", options["linear_over"])
            if options["capturable"]:
                raise ValueError(
                    f"linear_over={options['linear_over']} with capturable=True: a captured step "
                    "cannot change its number of directions. Leave out one of them"
                )
