"""The operations: every argument is checked here, then a backend does the work.

All arithmetic is in float32, in the order that the formulas show, with scalars computed in float64
and rounded to float32 once; ``fma`` rounds once. Results are stored to the weights' type: rounded
to nearest even, or stochastically (ROUNDINGS). Every backend gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import choose
from .plan import Plan
from .staging import batches
from .stream import DISTRIBUTIONS, ROUNDINGS, PhiloxState, check_state
from .terms import RULES, Direction, Terms

_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_HALF_MIN = 2.0**-150  # rounds to 0


def sample_(
    out: Tensor,
    state: PhiloxState,
    *,
    parameter: int = 0,
    distribution: str = "exact",
    backend: str | None = None,
) -> Tensor:
    """Fills ``out`` with elements of a direction: ``out[i] = z[state.offset + i]``, row-major.

    Args:
        out: a tensor that a :class:`Plan` takes.
        state: the direction.
        parameter: 24-bit index of the parameter whose elements these are.
        distribution: one of DISTRIBUTIONS.
        backend: None takes the best available; a name never falls back.

    Returns:
        ``out``.
    """
    plan = Plan([out], parameters=[parameter], names=["out"])
    terms = Terms.of([state])
    _check_stream(plan, terms, distribution)
    _run("sample", plan, terms, distribution, backend)
    return out


def perturb_(
    plan: Plan,
    state: Direction,
    scale: float,
    *,
    distribution: str = "exact",
    rounding: str = "nearest",
    backend: str | None = None,
) -> None:
    """``theta = fma(scale, z, theta)`` for every weight of the plan.

    Args:
        plan: the weights. If it is made by :meth:`Plan.into`, theta is read from one place and
            written to another.
        state: the direction z; of Terms, the first one. Where their rule bends directions it is
            what that displaces along, and the plan has the rule's buffers.
        scale: a finite number; in zeroth-order steps ``zo_eps``, ``-2 zo_eps`` and so on.
        rounding: of the store; one of ROUNDINGS.
        distribution, backend: as in :func:`sample_`.
    """
    terms = state if isinstance(state, Terms) else Terms.of([state])
    _check_stream(plan, terms, distribution)
    _check_rounding(rounding)
    scale = _number("scale", scale)
    if RULES[terms.rule].bends:
        _check_buffers(plan, terms)
    else:
        terms = terms.newest
    _run("perturb", plan, terms, distribution, backend, scale=scale, rounding=rounding)


def update_(
    plan: Plan,
    states: Sequence[PhiloxState],
    first: Sequence[float],
    second: Sequence[float] | None,
    *,
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    restore: float = 0.0,
    distribution: str = "exact",
    rounding: str = "nearest",
    backend: str | None = None,
) -> None:
    """Restores perturbed weights, forms the truncated moments and steps, in one pass.

    For every weight, with z_k the direction of ``states[k]``::

        theta = fma(restore, z_0, theta)                          if restore is not 0
        S1 = fma(first[k], z_k, S1),  S2 = fma(second[k], z_k z_k, S2)    for k = 0, 1, ...
        theta = fma(-lr, S1 / (sqrt(S2) + eps), theta (1 - lr weight_decay))

    This is AdaMeZO's update (arXiv 2605.00650, equations for m, v and theta) with the betas, the
    projected gradients and the normalization inside the coefficients, and decoupled weight decay.
    ``second=None`` stands for a denominator of 1: momentum, and with one direction MeZO.

    Args:
        plan: the weights.
        states: the directions kept, the newest first; they share key and offset.
        first, second: a finite coefficient for each direction; ``second`` not negative.
        lr: step size.
        eps: added to the root, positive where ``second`` is given (a z can be exactly 0).
        weight_decay: decoupled, as in AdamW.
        restore: the displacement along z_0 that is to be added back: ``zo_eps`` after the weights
            were left at ``theta - zo_eps z_0``.
        rounding: of the store; one of ROUNDINGS.
        distribution, backend: as in :func:`sample_`.
    """
    first, second = _check_sums(states, first, second)
    lr = _number("lr", lr)
    decay = _number("1 - lr * weight_decay", 1.0 - lr * _number("weight_decay", weight_decay))
    update_terms_(
        plan,
        Terms.of(states, first, second, minus_lr=-lr, decay=decay),
        eps=eps,
        restore=restore,
        distribution=distribution,
        rounding=rounding,
        backend=backend,
    )


def update_terms_(
    plan: Plan,
    terms: Terms,
    *,
    eps: float = 1e-8,
    restore: float = 0.0,
    distribution: str = "exact",
    rounding: str = "nearest",
    backend: str | None = None,
) -> None:
    """:func:`update_` with its directions, coefficients and step size out of ``terms``.

    With a rule other than "moments" its formula (csrc/adamezo/buffered.h) takes the place of S1 and
    S2: in the same pass the displacement is restored, the plan's buffers are brought up to date
    and the weights make the rule's step. Buffers of 16 bits are rounded as ``rounding`` says, with
    words of their own.

    What is in ``terms`` is not checked: where it is on a GPU, that would wait for the device.
    """
    _check_stream(plan, terms, distribution)
    _check_in_place(plan)
    _check_rounding(rounding)
    _check_buffers(plan, terms)
    if not RULES[terms.rule].updates:
        raise ValueError(f"the rule {terms.rule!r} only displaces: expected terms of an update")
    eps = _number("eps", eps)
    if terms.with_second and eps <= _FLOAT32_HALF_MIN:
        raise ValueError(f"eps must be positive in float32 where `second` is given, got {eps}")
    restore = _number("restore", restore)
    _run("update", plan, terms, distribution, backend, scale=restore, eps=eps, rounding=rounding)


def moments(
    plan: Plan,
    states: Sequence[PhiloxState],
    first: Sequence[float],
    second: Sequence[float] | None,
    *,
    distribution: str = "exact",
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The sums S1 and S2 of :func:`update_`, to look at: float32 tensors shaped like the weights.

    The weights are neither read nor written. Where ``second`` is None, S2 is all ones.

    Returns:
        (m, v): a list of tensors each, one for each tensor of the plan.
    """
    first, second = _check_sums(states, first, second)
    _check_in_place(plan)
    sums = []
    for squared in (False, True):
        out = [
            torch.empty(segment.tensor.shape, dtype=torch.float32, device=segment.tensor.device)
            for segment in plan
        ]
        sums.append(out)
        if squared and second is None:
            for ones in out:
                ones.fill_(1.0)
            continue
        terms = Terms.of(states, first, second if squared else None)
        _check_stream(plan, terms, distribution)
        _run("moment", plan.like(out), terms, distribution, backend)
    m, v = sums
    return m, v


def _run(
    operation: str,
    plan: Plan,
    terms: Terms,
    distribution: str,
    backend: str | None,
    **numbers: Any,
) -> None:
    chosen = choose((segment.tensor.device for segment in plan), backend, distribution)
    staged = batches(plan)  # before anything is written: they may find no memory
    chosen.run(operation, plan.walked, terms, distribution, **numbers)
    for batch in staged:
        if operation != "sample":
            batch.copy_out()
        chosen.run(operation, batch.plan, terms, distribution, **numbers)
        batch.copy_back()


def _check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")


def _check_buffers(plan: Plan, terms: Terms) -> None:
    expected = RULES[terms.rule].buffers
    if len(plan) and plan.buffers < expected:
        raise ValueError(
            f"the rule {terms.rule!r} keeps {expected} number(s) for each weight, the plan has "
            f"{plan.buffers}: pass `plan.with_buffers(...)`"
        )


def _check_in_place(plan: Plan) -> None:
    if not plan.in_place:
        raise ValueError(
            "this plan reads one set of tensors and writes another (Plan.into), which only "
            "perturb_ can do"
        )


def _check_stream(plan: Plan, terms: Terms, distribution: str) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be an adamezo_kernels.Plan, got {type(plan).__name__}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    last = max((segment.last_index for segment in plan), default=0)
    if terms.offset + last >= 2**63:
        raise ValueError(
            f"PhiloxState.offset {terms.offset} leads to element indices beyond 2**63, as the "
            f"plan's own reach {last}"
        )
    where = terms.words.device
    if where.type != "cpu":
        elsewhere = {str(s.tensor.device) for s in plan if s.tensor.device != where}
        if elsewhere:
            raise ValueError(
                f"the terms are on {where} and weights on {', '.join(sorted(elsewhere))}: expected "
                "terms on the host, or on the device of all weights"
            )


def _check_sums(
    states: Sequence[PhiloxState],
    first: Sequence[float],
    second: Sequence[float] | None,
) -> tuple[list[float], list[float] | None]:
    if not states:
        raise ValueError("got no states, expected at least one direction")
    for state in states:
        check_state(state)
    if len({(state.key, state.offset) for state in states}) > 1:
        raise ValueError("the states of one call must share key and offset")
    first = [_number("first", value) for value in first]
    if second is not None:
        second = [_number("second", value) for value in second]
        if min(second, default=0.0) < 0:
            raise ValueError(f"second must not be negative, got {min(second)}")
    for name, values in (("first", first), ("second", second)):
        if values is not None and len(values) != len(states):
            raise ValueError(f"{name} has {len(values)} coefficients for {len(states)} states")
    return first, second


def _number(name: str, value: float) -> float:
    value = float(value)
    if not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
        raise ValueError(f"{name} must be finite and within float32, got {value}")
    return value
