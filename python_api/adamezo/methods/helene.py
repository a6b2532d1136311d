"""HELENE as a torch optimizer: momentum over a clipped estimate of the curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState

from ..engine.arithmetic import Number, two_sided, where
from ..engine.base import Probe
from ..engine.closure import Closure
from .buffered import Buffered
from .common import check_betas, check_count, check_positive

CURVATURES = ("loss", "sampled")


class HELENE(Buffered):
    r"""Annealed momentum over a clipped estimate of the curvature (arXiv 2411.10696).

    With p the projected gradient of step t = 0, 1, ... along z, and p_hat that of a loss against
    labels that are sampled from the model, every ``curvature_every`` steps::

        alpha_t = beta1 + (1 - beta1) exp(-t / anneal)
        m <- beta1 m + alpha_t p z
        h <- beta2 h + (1 - beta2) B p_hat^2 z^2                   every curvature_every steps
        theta <- theta (1 - lr weight_decay) - lr m / (gamma max(h, clip) + eps)

    Two numbers are kept for each weight, ``state[p]["m"]`` and ``state[p]["h"]``.

    ``curvature="sampled"`` is the paper's: :meth:`~adamezo.AdaMeZO.step` then takes a
    second closure, and calls it in the steps that update h. ``curvature="loss"`` takes p for p_hat,
    which costs no evaluation: the empirical Fisher information in the place of Gauss-Newton's
    matrix.

    Deviations: p_hat is along the step's own z, where the paper draws another. ``clip`` is by
    group; the paper's is by layer: make groups of layers. No code of the authors was found, and
    neither gamma, clip, anneal nor curvature_every are published where we could look: those, lr and
    the betas have defaults of ours. With them h stays below ``clip``, and the step is MeZO's with
    annealed momentum, until a ``clip`` is found for the task.

    Args:
        params: as for :class:`AdaMeZO`.
        lr: step size, by group.
        betas: (beta1, beta2) in [0, 1), by group.
        gamma: factor of the curvature, by group.
        clip: the least curvature, by group.
        eps: added to the denominator, by group.
        anneal: T, after how many steps the annealing has fallen to 1 / e, by group.
        curvature: "loss" or "sampled", see above.
        curvature_every: how many steps apart h is updated, counting skipped ones.
        batch_size: B, of how many examples a loss is the mean.
        zo_eps: the perturbation scale mu.
        common: as for :class:`MeZO`, and ``buffer_dtype``: "float32" or "bfloat16", by group.

    Attributes:
        measured (tuple[float, float]): p and p_hat of the last step, the latter 0 where there was
            none; empty if it failed.
    """

    rule = "helene"
    buffers = {"m": 0.0, "h": 0.0}
    shared_options = (*Buffered.shared_options, "curvature", "curvature_every")

    _stacklevel = Buffered._stacklevel + 2  # step here, and the wrapper around it
    _sampled: Closure | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-6,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        gamma: float = 1.0,
        clip: float = 1.0,
        eps: float = 1e-8,
        anneal: float = 1000.0,
        curvature: str = "loss",
        curvature_every: int = 10,
        batch_size: int = 1,
        zo_eps: float = 1e-3,
        **common: Any,
    ) -> None:
        own = dict(
            lr=lr,
            betas=betas,
            gamma=gamma,
            clip=clip,
            eps=eps,
            anneal=anneal,
            curvature=curvature,
            curvature_every=curvature_every,
            batch_size=batch_size,
            zo_eps=zo_eps,
        )
        super().__init__(params, own, common)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Closure | None = None, sampled: Closure | None = None
    ) -> Tensor | None:
        """One step.

        Args:
            closure: as for :class:`AdaMeZO`.
            sampled: with ``curvature="sampled"``, evaluates the loss against labels sampled from
                the model; the same labels each time within a step. Not called by steps that leave
                h alone.

        Returns:
            The mean of the losses, without those of ``sampled``.
        """
        if closure is None:
            return super().step()
        if sampled is None and self._shared_options()["curvature"] == "sampled" and self.due:
            raise ValueError(
                "this step updates the curvature from sampled labels: expected step(closure, "
                "sampled), where the second evaluates the loss against them. curvature='loss' "
                "needs none"
            )
        self._sampled = sampled
        try:
            mean = super().step(closure)
        finally:
            self._sampled = None
        if len(self.losses) == 4:
            return mean.new_tensor((self.losses[0] + self.losses[2]) / 2)
        return mean

    @property
    def due(self) -> bool:
        """Whether the next step updates the curvature."""
        self._read_back()
        group = self.param_groups[0]
        return bool(group["next_direction"] % group["curvature_every"] == 0)

    def _closures(self, closure: Closure, probes: Sequence[Probe]) -> list[Closure]:
        if len(probes) == 2 or self._sampled is None:
            return [closure] * len(probes)
        return [closure, self._sampled] * 2

    def _probes(self, first: PhiloxState, options: dict[str, Any]) -> list[Probe]:
        mu = options["zo_eps"]
        due = first.counter % options["curvature_every"] == 0
        times = 2 if options["curvature"] == "sampled" and due else 1
        return [*[(first, mu)] * times, *[(first, -mu)] * times]

    def _measure(self, losses: Sequence[Number], options: dict[str, Any]) -> tuple[Number, ...]:
        mu, half = options["zo_eps"], len(losses) // 2
        p = two_sided(losses[0], losses[half], mu)
        if half == 2:
            return p, two_sided(losses[1], losses[3], mu)
        return p, (p if options["curvature"] == "loss" else 0.0)

    @staticmethod
    def _numbers(
        p: Number, others: Sequence[Number], counter: Number, schedule: dict[str, Number],
        group: dict[str, Any],
    ) -> Sequence[Number]:  # fmt: skip
        (p_hat,) = others
        beta1, beta2 = group["betas"]
        rests = counter % group["curvature_every"] != 0
        fresh = (1 - beta2) * group["batch_size"] * p_hat * p_hat
        of_m = beta1, schedule["alpha"] * p
        of_h = where(rests, 1.0, schedule["beta2"]), where(rests, 0.0, fresh)
        return [*of_m, *of_h, group["gamma"], group["clip"]]

    @staticmethod
    def _scheduled(step: int, group: dict[str, Any]) -> dict[str, float]:
        beta1 = group["betas"][0]
        alpha = beta1 + (1 - beta1) * math.exp(-(step - 1) / group["anneal"])
        return {"alpha": alpha, "beta2": group["betas"][1]}

    @staticmethod
    def _settled(group: dict[str, Any]) -> int:
        beta1, anneal = float(group["betas"][0]), float(group["anneal"])
        # From where on what is added to beta1 is below its last place; exp(-746) is 0.
        after = 746.0 if beta1 == 0 else 38 + max(math.log((1 - beta1) / beta1), 0.0)
        return 2 + math.ceil(after * anneal)

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        check_betas(options["betas"])
        for name in ("gamma", "clip", "anneal"):
            check_positive(name, options[name])
        check_positive("gamma * clip", options["gamma"] * options["clip"])
        if not 0.0 <= options["eps"] < math.inf:
            raise ValueError(f"Invalid epsilon value: {options['eps']}")
        if options["curvature"] not in CURVATURES:
            raise ValueError(
                f"Invalid curvature: {options['curvature']!r}, expected one of {CURVATURES}"
            )
        check_count("curvature_every", options["curvature_every"])
        check_count("batch_size", options["batch_size"])
        if options["capturable"] and options["curvature"] == "sampled":
            raise ValueError(
                "curvature='sampled' with capturable=True: a captured step has the same "
                "evaluations each time. Take curvature='loss', or leave out capturable"
            )
        self._check_schedule(options, "betas", "anneal")
