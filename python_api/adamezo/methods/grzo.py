"""GRZO as a torch optimizer: a direction for each example, all from one matrix of normals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState

from ..engine.arithmetic import Number, alike, quotient, square_root, total, where
from ..engine.base import Probe
from ..engine.batched import BatchedClosure
from ..engine.closure import Closure
from .common import check_count, directions_from
from .memoryless import Memoryless


class GRZO(Memoryless):
    """Group-relative zeroth-order steps: a direction for each example (arXiv 2606.02857).

    A batch has B parts of equal length, as a rule one example each. Part i is evaluated on both
    sides along its own direction z_i, and the update weighs each direction by its part's difference
    over the spread of all of them::

        delta_i = (L_i(theta + sigma z_i) - L_i(theta - sigma z_i)) / 2
        s^2 = sum_i (delta_i - mean delta)^2 / (B - 1)
        a_i = delta_i / (s + eps)
        theta <- theta (1 - lr weight_decay) - lr / (2 sigma B) sum_i a_i z_i

    Directions are ``flipout`` ones that share their normals: z_i = U * (r_i s_i^T) for a matrix,
    with signs r_i and s_i, so that with ``perturbation="regenerated"`` a step is one forward of a
    batch twice as large, and the update makes U once. Where all delta_i are equal there is no
    scale: such a step has a sum of 0.

    The closure is one of :func:`adamezo.batched`, which sees each part. A closure that is not has
    one loss for all parts, and is evaluated 2 B times on the whole batch.

    Deviations from the authors' code: vectors such as norm weights and biases have normals of each
    direction's own, where theirs has signs for norms, and embeddings are matrices like all others.
    lr and sigma are theirs for Llama3-8B.

    Args:
        params: as for :class:`AdaMeZO`.
        lr: step size, by group.
        examples: B, at least 2: how many parts a batch has. The rows of each batch are a multiple
            of it.
        eps: added to the spread.
        zo_eps: the perturbation scale sigma.
        common: as for :class:`MeZO`, but that ``distribution`` is ``"flipout:B"`` if not given.

    Attributes:
        measured (tuple[float, ...]): a_i / (2 sigma) of the last step, zeros where all delta_i were
            equal; empty if it failed.
        losses (tuple[float, ...]): of the last step: of each part at +sigma, then at -sigma.
    """

    shared_options = (*Memoryless.shared_options, "examples", "eps")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-7,
        examples: int = 16,
        *,
        eps: float = 1e-8,
        zo_eps: float = 1e-3,
        **common: Any,
    ) -> None:
        common.setdefault("distribution", f"flipout:{examples}")
        own = dict(lr=lr, examples=examples, eps=eps, zo_eps=zo_eps)
        super().__init__(params, own, common)

    def _probes(self, first: PhiloxState, options: dict[str, Any]) -> list[Probe]:
        directions = directions_from(first, options["examples"])
        return [(z, side) for side in (options["zo_eps"], -options["zo_eps"]) for z in directions]

    def _closures(self, closure: Closure, probes: Sequence[Probe]) -> list[Closure]:
        if not isinstance(closure, BatchedClosure):
            return super()._closures(closure, probes)
        parts = len(probes) // 2
        return [closure.of_part(i % parts, parts) for i in range(len(probes))]

    def _measure(self, losses: Sequence[Number], options: dict[str, Any]) -> tuple[Number, ...]:
        half = len(losses) // 2
        pairs = zip(losses[:half], losses[half:], strict=True)
        deltas = [0.5 * (plus - minus) for plus, minus in pairs]
        mean = quotient(total(deltas), half)
        apart = [delta - mean for delta in deltas]
        spread = square_root(quotient(total(x * x for x in apart), half - 1))
        flat = (spread == 0) | alike(deltas)  # of equal numbers it may be a rounding error
        unit = where(flat, 1.0, 2 * options["zo_eps"] * (spread + options["eps"]))
        return tuple(quotient(where(flat, 0.0, delta), unit) for delta in deltas)

    def unit_length(self, group: dict[str, Any]) -> float | None:
        """The mean of N directions, each of about 1 / (2 sigma). Of two examples sigma is often
        near 0, and steps have no typical length."""
        if group["examples"] == 2:
            return None
        return 1 / (2 * float(group["zo_eps"]) * math.sqrt(group["examples"]))

    def check_options(self, options: dict[str, Any]) -> None:
        if type(options["examples"]) is int:  # before the distribution that has this number
            check_count("examples", options["examples"], least=2)
        super().check_options(options)
        if not 0.0 <= options["eps"] < float("inf"):
            raise ValueError(
                f"Invalid eps value: {options['eps']}, expected a number of at least 0"
            )
