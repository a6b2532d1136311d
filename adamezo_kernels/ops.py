"""The public operations: each makes a Call, which checks its arguments, and a backend runs it.

All arithmetic is in float32, in the order that the formulas show, with scalars computed in float64
and rounded to float32 once; ``fma`` rounds once. Results are stored to the weights' type: rounded
to nearest even, or stochastically (ROUNDINGS). Every backend gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import Backend, choose
from .call import Call, check_in_place, checked_number, checked_numbers
from .plan import Plan
from .staging import batches
from .stream import PhiloxState
from .terms import Direction, Terms


def sample_(
    out: Tensor,
    state: PhiloxState,
    *,
    parameter: int = 0,
    distribution: str = "exact",
    backend: str | Backend | None = None,
) -> Tensor:
    """Fills ``out`` with elements of a direction: ``out[i] = z[state.offset + i]``, row-major.

    Args:
        out: a tensor that a :class:`Plan` takes.
        state: the direction.
        parameter: 24-bit index of the parameter that the elements belong to.
        distribution: one of DISTRIBUTIONS. A ``lowrank`` or ``flipout`` direction belongs to the
            rows and columns of ``out``, whose offset is a number of whole rows.
        backend: None takes the best available; a name never falls back. A backend returned by
            :func:`adamezo_kernels.backends.choose` is used without choosing again.

    Returns:
        ``out``.
    """
    plan = Plan([out], parameters=[parameter], names=["out"])
    run(Call("sample", plan, Terms.of([state]), distribution), backend)
    return out


def perturb_(
    plan: Plan,
    state: Direction,
    scale: float,
    *,
    distribution: str = "exact",
    rounding: str = "nearest",
    backend: str | Backend | None = None,
) -> None:
    """``theta = fma(scale, z, theta)`` for every weight of the plan.

    Args:
        plan: the weights. In a plan of :meth:`Plan.into`, theta is read from one tensor and
            written to another.
        state: the direction z; of Terms, the first one. Where their rule has a direction of its
            own, that is z, and the plan has the rule's buffers.
        scale: a finite number; in zeroth-order steps ``zo_eps``, ``-2 zo_eps`` and so on.
        rounding: how the store rounds; one of ROUNDINGS.
        distribution, backend: as in :func:`sample_`.
    """
    terms = state if isinstance(state, Terms) else Terms.of([state])
    run(Call("perturb", plan, terms, distribution, rounding, scale), backend)


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
    backend: str | Backend | None = None,
) -> None:
    """Restores perturbed weights, sums the truncated moments and steps, in one pass.

    For every weight, with z_k the direction of ``states[k]``::

        theta = fma(restore, z_0, theta)                          if restore is not 0
        S1 = fma(first[k], z_k, S1),  S2 = fma(second[k], z_k z_k, S2)    for k = 0, 1, ...
        theta = fma(-lr, S1 / (sqrt(S2) + eps), theta (1 - lr weight_decay))

    This is AdaMeZO's update (arXiv 2605.00650, equations for m, v and theta) with the betas, the
    projected gradients and the normalization inside the coefficients, and decoupled weight decay.
    ``second=None`` stands for a denominator of 1: momentum, and with one direction MeZO.

    Args:
        plan: the weights.
        states: the directions, the newest first; they share key and offset.
        first, second: a finite coefficient for each direction; ``second`` not negative.
        lr: step size.
        eps: added to the root, positive where ``second`` is given (a z can be exactly 0).
        weight_decay: decoupled, as in AdamW.
        restore: the scale of the perturbation along z_0 that is added back first: ``zo_eps`` after
            the weights were left at ``theta - zo_eps z_0``.
        rounding: how the store rounds; one of ROUNDINGS.
        distribution, backend: as in :func:`sample_`.
    """
    first, second = _check_sums(states, first, second)
    lr = checked_number("lr", lr)
    decay = checked_number(
        "1 - lr * weight_decay", 1.0 - lr * checked_number("weight_decay", weight_decay)
    )
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
    backend: str | Backend | None = None,
) -> None:
    """:func:`update_` with its directions, coefficients and step size from ``terms``.

    With a rule other than "moments" the rule's formula (csrc/adamezo/buffered.h) takes the place of
    S1 and S2: in the same pass the weights are restored, the plan's buffers are updated and the
    weights make the rule's step. Buffers of 16 bits are rounded as ``rounding`` says, with random
    words of their own.

    The values in ``terms`` are not checked: on a GPU that would wait for the device.
    """
    run(Call("update", plan, terms, distribution, rounding, restore, eps), backend)


def moments(
    plan: Plan,
    states: Sequence[PhiloxState],
    first: Sequence[float],
    second: Sequence[float] | None,
    *,
    distribution: str = "exact",
    backend: str | Backend | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The sums S1 and S2 of :func:`update_`, for inspection: float32, shaped like the weights.

    The weights are neither read nor written. Where ``second`` is None, S2 is all ones.

    Returns:
        (m, v): a list of tensors each, one for each tensor of the plan.
    """
    first, second = _check_sums(states, first, second)
    check_in_place(plan)
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
        run(Call("moment", plan.like(out), terms, distribution), backend)
    m, v = sums
    return m, v


def run(call: Call, backend: str | Backend | None = None) -> None:
    """Runs a call of any operation, on the backend given or on the best one.

    This is the only place that copies staged tensors (staging.py): the backend gets them as another
    call, on the plan of their copies.
    """
    chosen = choose(call.plan.devices, backend, call.distribution)
    staged = batches(call.plan)  # before any write, as this may run out of memory
    chosen.run(call)
    for batch in staged:
        if call.operation != "sample":
            batch.copy_out()
        chosen.run(call.on(batch.plan))
        batch.copy_back()


def _check_sums(
    states: Sequence[PhiloxState],
    first: Sequence[float],
    second: Sequence[float] | None,
) -> tuple[list[float], list[float] | None]:
    first = checked_numbers("first", first)
    if second is not None:
        second = checked_numbers("second", second)
        if min(second, default=0.0) < 0:
            raise ValueError(f"second must not be negative, got {min(second)}")
    for name, values in (("first", first), ("second", second)):
        if values is not None and len(values) != len(states):
            raise ValueError(f"{name} has {len(values)} coefficients for {len(states)} states")
    return first, second
