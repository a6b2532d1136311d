"""AdaMeZO as a torch optimizer: Adam-style steps from forward passes, with no stored moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState, Terms

from ..engine.arithmetic import Number
from ..engine.optimizer import ZerothOrder
from .common import check_betas, check_count
from .history import NORMALIZATIONS, DeviceHistory, coefficients


class AdaMeZO(ZerothOrder):
    r"""Zeroth-order fine-tuning with Adam's moments, truncated and regenerated (arXiv 2605.00650).

    A step evaluates the closure twice, at :math:`\theta + \mu z` and :math:`\theta - \mu z`, for a
    random direction z. With the projected gradient
    :math:`p = (L_+ - L_-) / (2 \mu)` it keeps one float and one direction index; the moments over
    the last ``horizon`` steps are summed up again from regenerated directions while the weights
    are restored and updated, in one pass and without a temporary::

        theta <- theta (1 - lr weight_decay) - lr m / (sqrt(v) + eps)

    where m and v are the sums of :mod:`adamezo.methods.history`. MeZO is
    ``AdaMeZO(params, lr, betas=(0.0, 0.0))``; MeZO with momentum has ``betas=(beta1, 0.0)``.

    Args:
        params: parameters, groups of them, or ``model.named_parameters()`` (whose names then
            appear in messages). Those with ``requires_grad=False`` are left alone; tied weights are
            one parameter.
        lr: step size, by group.
        betas: (beta1, beta2) in [0, 1), by group; ``beta2 = 0`` means v = 1.
        eps: added to sqrt(v), by group. The authors' released code has 1e-5 beside its
            ``"official"`` normalization.
        zo_eps: the perturbation scale mu.
        horizon: how many directions the moments reach back over, by group.
        weight_decay: decoupled, by group.
        normalization: ``"paper"``, ``"bias_corrected"`` or ``"official"``, by group.
        warmup_lr: None uses the truncated moments from the first step on; a number makes the first
            ``horizon + 1`` steps plain MeZO steps ``theta <- theta - warmup_lr p z``, whatever
            ``lr`` and its scheduler say, by group.
        distribution: of z: ``"exact"`` normals, with the same bits on every device; ``"fast"``
            ones, on CUDA devices only; ``"rademacher"`` signs; ``"lowrank"`` outer products of two
            normal vectors for each matrix, or ``"lowrank:4"`` of rank 4
            (docs/directions.md).
        perturbation: ``"inplace"`` writes the perturbed weights and restores them, up to rounding
            in 16 bits; ``"out_of_place"`` never writes them: modules read perturbed copies while
            they run (docs/perturbation.md). ``"exact"`` is a former name of the latter.
            ``"regenerated"`` never writes or copies them: modules compute with a piece of a
            perturbed weight at a time, or correct what they compute by a low-rank direction. It
            evaluates both sides in one forward if the closure is :func:`adamezo.batched`.
        rounding: of 16-bit weights as a step leaves them, by group: ``"stochastic"``, so that steps
            far below a weight's last place move it now and then, or ``"nearest"``, where they never
            do. Perturbed weights are always rounded to nearest.
        nonfinite: what a non-finite loss does: ``"skip"`` the step, or ``"raise"`` a
            FloatingPointError. Either way the weights are restored and the history stays as it was.
        max_skipped: how many steps in a row may be skipped before a FloatingPointError says that
            the run is lost. The count is in the state: a resumed run goes on with it.
        maximize: ascend instead of descend (a reward, an accuracy), by group.
        fused: None uses the compiled kernels where there are some; True is an error without them;
            False uses the reference backend, which is plain torch and slow.
        capturable: numbers of a step are tensors on the weights' device and nothing is read back,
            so that a step can be captured in a CUDA graph (docs/cuda_graphs.md).
        seed: 64-bit key of all directions; None draws one from torch's default generator.
        differentiable: refused; a forward-only step has no graph.
        model: what the closure evaluates; all perturbations but ``"inplace"`` need it. All
            ``params`` must be its. :meth:`for_model` takes both from one model.

    Both evaluations see the same random numbers (dropout masks included), and leave the generators
    of torch, and the global ones of Python and numpy, where one evaluation would have: directions
    are not drawn from them.

    If the closure raises, the weights are restored (up to rounding, as they were perturbed in
    place) and nothing else has happened. If a loss is not finite the weights are restored, the
    step is left out of the history and counted in ``skipped``.

    Attributes:
        projected_grad (float): p of the last step.
        losses (tuple[float, float]): the losses of the last step, at +mu and -mu.
        skipped (int): steps left out because of a non-finite loss, since this object was made or
            a state was loaded into it.
        recorder (Callable[[StepRecord], None] | None): called at the end of every step, and of
            failed ones that have touched the weights.
    """

    history = {"directions": [], "projected_grads": []}  # the newest first
    fixed_options = (*ZerothOrder.fixed_options, "normalization")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.7, 0.9),
        eps: float = 1e-8,
        *,
        zo_eps: float = 1e-3,
        horizon: int = 10,
        weight_decay: float = 0.0,
        normalization: str = "paper",
        warmup_lr: float | None = None,
        distribution: str = "exact",
        perturbation: str = "inplace",
        rounding: str = "stochastic",
        nonfinite: str = "skip",
        max_skipped: int = 20,
        maximize: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        seed: int | None = None,
        differentiable: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                zo_eps=zo_eps,
                horizon=horizon,
                weight_decay=weight_decay,
                normalization=normalization,
                warmup_lr=warmup_lr,
                distribution=distribution,
                perturbation=perturbation,
                rounding=rounding,
                nonfinite=nonfinite,
                max_skipped=max_skipped,
                maximize=maximize,
                fused=fused,
                capturable=capturable,
                seed=seed,
            ),
            differentiable,
            model,
        )

    @property
    def projected_grad(self) -> Number:
        """p of the last step; NaN before the first and after one that failed. A tensor if
        ``capturable``."""
        return self.measured[0] if self.measured else math.nan

    def _terms(
        self, group: dict[str, Any], first: PhiloxState, measured: tuple[float, ...]
    ) -> tuple[Terms, dict[str, Any]]:
        horizon = group["horizon"]
        grads = [*measured, *group["projected_grads"]][:horizon]
        counters = [first.counter, *group["directions"]][:horizon]
        m: Sequence[float]
        if group["warmup_lr"] is not None and group["steps"] <= horizon:
            lr, m, v = group["warmup_lr"], grads[:1], None
        else:
            lr = float(group["lr"])
            m, v = self._coefficients(grads, group)
        terms = Terms.of_counters(
            first.key,
            counters[: len(m)],
            [-value for value in m] if group["maximize"] else m,
            v,
            minus_lr=-lr,
            decay=1 - lr * group["weight_decay"],
        )
        return terms, {"projected_grads": grads, "directions": counters}

    def unit_length(self, group: dict[str, Any]) -> float | None:
        """That of a full history with p of one size: each z is in the m of ``horizon`` steps."""
        alike = [1.0] * group["horizon"]
        m, v = coefficients(alike, group["betas"], group["normalization"])
        return None if v is None else sum(m) / math.sqrt(sum(v))

    def _coefficients(
        self, grads: Sequence[float], group: dict[str, Any]
    ) -> tuple[Sequence[float], Sequence[float] | None]:
        """Of z_k in m and of z_k^2 in v."""
        return coefficients(grads, group["betas"], group["normalization"])

    def _device_group(
        self, group: dict[str, Any], directions: int, device: torch.device
    ) -> DeviceHistory:
        return DeviceHistory(group, device, with_second=group["betas"][1] != 0)

    def _check_state(self, saved: dict[str, Any], group: dict[str, Any], where: str) -> None:
        super()._check_state(saved, group, where)
        directions, grads = saved["directions"], saved["projected_grads"]
        if not (
            type(directions) is type(grads) is list
            and len(directions) == len(grads) <= saved["steps"]
            and all(type(p) is float and math.isfinite(p) for p in grads)
            and all(type(k) is int for k in directions)
            # The newest first.
            and all(a > b for a, b in pairwise([saved["next_direction"], *directions, -1]))
        ):
            raise ValueError(
                f"{where} is damaged: its directions are {directions} and its projected_grads "
                f"{grads}, before direction {saved['next_direction']}"
            )

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        check_betas(options["betas"])
        # Not 0: a z that is exactly 0 would give 0 / 0.
        if not 0.0 < options["eps"] < math.inf:
            raise ValueError(f"Invalid epsilon value: {options['eps']}")
        check_count("horizon", options["horizon"])
        if options["normalization"] not in NORMALIZATIONS:
            raise ValueError(
                f"Invalid normalization: {options['normalization']!r}, expected one of "
                f"{NORMALIZATIONS}"
            )
        warmup_lr = options["warmup_lr"]
        if warmup_lr is not None and not 0.0 <= warmup_lr < math.inf:
            raise ValueError(f"Invalid warmup_lr value: {warmup_lr}")
        if warmup_lr is not None and options["capturable"]:
            raise ValueError(
                f"warmup_lr={warmup_lr} with capturable=True: a captured step cannot go from one "
                "rule to another. Warm up without capturable and load the state, or pass None"
            )
