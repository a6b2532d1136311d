"""Every rule that keeps numbers for each weight: its numbers of some step, a call of it, and its
formula in float64. A new rule has its row here."""

from __future__ import annotations

import functools
import math

import torch

from adamezo_kernels import RULES, PhiloxState, Plan, Terms, perturb_, update_terms_

from .operations import KEY, OFFSET, unguarded, zoo

NUMBERS = {  # of some step
    "adam": (0.9, 0.1 * -1.7, 0.99, 0.01 * 1.7**2, 1 / (1 - 0.9**3), 1 / (1 - 0.99**3)),
    "hizoo": (-1e-6, 1e-6 * 3e4, -1.7),
    "helene": (0.9, 0.97 * -1.7, 0.99, 0.01 * 16 * 0.8**2, 0.5, 0.3),
    "adamu": (math.sqrt(0.6), math.sqrt(0.4), 0.9, 0.1, 0.3, 0.7, -1.7),
    "blend": (1.0, -0.7),
}
EPS, LR, DECAY, RESTORE = 1e-8, 0.02, 1 - 0.02 * 0.1, 1e-2


def terms_of(rule: str, minus_lr: float = -LR) -> Terms:
    states = [PhiloxState(KEY, 2**32 - 1 - k, OFFSET) for k in range(RULES[rule].directions)]
    return Terms.of(states, minus_lr=minus_lr, decay=DECAY, rule=rule, numbers=NUMBERS[rule])


def filled(rule: str, i: int, like: torch.Tensor, seed: int, make) -> torch.Tensor:
    """A buffer with values as they may be: a mean of either sign, or a positive curvature."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(like.numel(), generator=generator)
    if rule == "hizoo" or i == 1:
        values = values.exp()
    buffer = make(like.numel(), like.dtype, seed % 8)
    return buffer.copy_(values).view(like.shape)


def with_buffers(rule, tensors, layout, dtype, make) -> tuple[Plan, list[list[torch.Tensor]]]:
    buffers = []
    for k, tensor in enumerate(tensors):
        like = torch.empty(tensor.shape, dtype=dtype, device="meta")
        buffers.append([filled(rule, i, like, 2 * k + i, make) for i in range(RULES[rule].buffers)])
    return Plan(tensors, **layout).with_buffers(buffers), buffers


def run(rule, dtype, buffer_dtype, kind, backend, make):
    """All tensors after a perturbation and an update that takes another one back."""
    distribution, rounding = kind
    tensors, layout = zoo(dtype, make)
    plan, buffers = with_buffers(rule, tensors, layout, buffer_dtype, make)
    perturb_(
        plan, terms_of(rule), -RESTORE, distribution=distribution, rounding=rounding,
        backend=backend,
    )  # fmt: skip
    if RULES[rule].updates:
        update_terms_(
            plan, terms_of(rule), eps=EPS, restore=RESTORE, distribution=distribution,
            rounding=rounding, backend=backend,
        )  # fmt: skip
    return [*tensors, *(buffer for kept in buffers for buffer in kept)]


@functools.cache
def by_reference(rule, dtype, buffer_dtype, kind):
    return run(rule, dtype, buffer_dtype, kind, "reference", unguarded)


def by_the_formula(rule, theta, kept, u):
    """(the direction, the step, the buffers afterwards) in float64, from the papers."""
    n = NUMBERS[rule]
    if rule == "blend":
        return n[0] * u[0] + n[1] * u[1], None, []
    if rule == "adam":
        m, v = n[0] * kept[0] + n[1] * u[0], n[2] * kept[1] + n[3] * u[0] ** 2
        return u[0], n[4] * m / ((n[5] * v).sqrt() + EPS), [m, v]
    if rule == "hizoo":
        alpha, curvature = -n[0], n[1] / -n[0]
        d = (1 - alpha) * kept[0] + alpha * curvature * kept[0] * u[0] ** 2
        return u[0] / kept[0].sqrt(), n[2] * u[0] / d.sqrt(), [d]
    if rule == "helene":
        m, h = n[0] * kept[0] + n[1] * u[0], n[2] * kept[1] + n[3] * u[0] ** 2
        return u[0], m / (n[4] * h.clamp(min=n[5]) + EPS), [m, h]
    fresh, moving = n[0] * u[0], kept[0] + n[1] * u[1]
    d = n[2] * fresh + n[3] * moving
    v = n[4] * fresh**2 + n[5] * moving**2
    return d, n[6] * d / (v + EPS).sqrt(), [d]
