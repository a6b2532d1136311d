"""AdaZeta's query schedule as a torch optimizer: MeZO with more directions as epochs pass."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .common import check_count
from .memoryless import Memoryless
from .mezo import MeZO


class AdaZeta(MeZO):
    """MeZO along a number of directions that grows with the epochs (arXiv 2406.18060, its adaptive
    query schedule)::

        Q_k = min(max(floor(alpha epoch^exponent), 1), queries)
        theta <- theta (1 - lr weight_decay) - lr / Q_k sum_q p_q z_q

    The authors' code has ``exponent = ln(NUM / alpha) / ln(epochs)`` with NUM = 20, for which
    :meth:`schedule` is: with it, the published run is
    ``AdaZeta(params, **AdaZeta.schedule(loader, epochs))`` at a batch size of 16.

    ``capturable`` is refused, as a captured step has a fixed number of directions.

    Deviations: the mean is never formed as a gradient. Epochs are whole, counted from 0 by steps
    that were not skipped. The paper trains tensor-train adapters, which ``adamezo.adapters`` has;
    ``params`` may be any.

    Args:
        params, lr, zo_eps, common: as for :class:`MeZO`, but for ``capturable``.
        queries: Q_max, the most directions that a step has.
        steps_per_epoch: how many steps an epoch has.
        exponent: of the epoch.
        alpha: factor of the power.
    """

    shared_options = (
        *Memoryless.shared_options,
        "queries",
        "steps_per_epoch",
        "exponent",
        "alpha",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        queries: int = 15,
        *,
        steps_per_epoch: int,
        exponent: float,
        alpha: float = 0.85,
        zo_eps: float = 1e-3,
        **common: Any,
    ) -> None:
        own = dict(
            lr=lr,
            queries=queries,
            steps_per_epoch=steps_per_epoch,
            exponent=exponent,
            alpha=alpha,
            zo_eps=zo_eps,
        )
        Memoryless.__init__(self, params, own, common)  # MeZO's own has another schedule

    @staticmethod
    def schedule(
        batches: int | Sized, epochs: int, *, alpha: float = 0.85, last: float = 20.0
    ) -> dict[str, Any]:
        """The options of the published schedule over a run.

        Args:
            batches: how many an epoch has, or a data loader, whose length that is.
            epochs: of the run, two or more.
            alpha: the option.
            last: NUM, which the bare power comes to after the last epoch; fewer than 1 direction
                and more than ``queries`` are never taken.

        Returns:
            ``steps_per_epoch``, ``exponent`` and ``alpha``.
        """
        if epochs < 2:
            raise ValueError(
                f"Invalid epochs: {epochs}, expected two or more, as the schedule grows from the "
                "second epoch on. MeZO has a constant number of directions"
            )
        if not 0.0 < alpha < last:
            raise ValueError(f"Invalid alpha: {alpha}, expected a number between 0 and {last}")
        steps = batches if isinstance(batches, int) else len(batches)
        check_count("steps_per_epoch", steps)
        exponent = math.log(last / alpha) / math.log(epochs)
        return {"steps_per_epoch": steps, "exponent": exponent, "alpha": alpha}

    def queries_at(self, step: int, options: dict[str, Any]) -> int:
        """Q_k at a step, counted from 0."""
        most: int = options["queries"]
        epoch = step // options["steps_per_epoch"]
        try:
            wanted: float = options["alpha"] * epoch ** options["exponent"]
        except OverflowError:
            return most
        return max(math.floor(min(wanted, most)), 1)

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        check_count("steps_per_epoch", options["steps_per_epoch"])
        for name in ("exponent", "alpha"):
            if not 0.0 < options[name] < math.inf:
                raise ValueError(f"Invalid {name}: {options[name]}, expected a positive number")
        if options["capturable"]:
            raise ValueError(
                "AdaZeta cannot do capturable=True: a captured step cannot change its number of "
                "directions, and MeZO has a constant one"
            )
