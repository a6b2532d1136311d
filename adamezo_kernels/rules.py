"""Rules: the formulas of an update, over directions and the optimizer buffers of each weight.

Each rule is written once in Python, over the operations of float32.py. Called as they are, its
functions are the definition, on torch tensors. Triton compiles the same source over operations of
its own (backends/_triton_kernels.py), so a function has only calls of those operations, constant
indices, and no annotations. csrc/adamezo/buffered.h and rule.h have each rule again for CPU and
CUDA, with the operations in the same order, so that the two sources check each other.

``z`` holds a value for each direction, ``b`` one for each buffer, ``n`` the step's own numbers.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .float32 import add, div, fma, larger, mul, smaller, sqrt


@dataclass(frozen=True)
class Rule:
    """The direction that weights are perturbed along, and the update of weights and buffers."""

    directions: int
    buffers: int
    numbers: tuple[str, ...]
    """The step's own numbers, in the order of `Terms.numbers`."""
    direction: Callable[..., Any] | None = None
    """``(z, b, n)``: the direction that weights are perturbed along; None where it is z_0."""
    bound: Callable[..., float] | None = None
    """``(z, b, n)``: the largest magnitude that ``direction`` can have, as a float, where no z
    exceeds the float ``z``. A rule with a direction has one, so that perturbations which might
    overflow can be refused. ``b`` is None where buffers are not to be read; else it has an
    :class:`Extremes` for each. ``n`` is `Terms.numbers`."""
    step: Callable[..., Any] | None = None
    """``(z, b, n, eps)``: the step of theta <- theta decay - lr step, and the new values of the
    buffers, as a tuple; None where the rule only perturbs."""
    noop: Mapping[int, float] | None = None
    """Scalars, by index, that make an lr = 0 update a no-op: weights and buffers stay as they are.
    None where no scalars do that."""

    def __post_init__(self) -> None:
        if self.has_direction and self.bound is None:
            raise TypeError("a rule with a direction needs a bound on its magnitude")

    @property
    def has_direction(self) -> bool:
        """Whether weights are perturbed along another direction than z_0."""
        return self.direction is not None

    @property
    def updates(self) -> bool:
        """Whether it has an update, besides a perturbation."""
        return self.step is not None


class Extremes(Protocol):
    """Statistics of a buffer that a bound may read. Each is computed when it is asked for."""

    def least(self) -> float:
        """The smallest element; NaN if any element is NaN."""

    def largest(self) -> float:
        """The largest magnitude of a finite element."""


# --- shared by all rules ------------------------------------------------------------------------


def default_direction(z, b, n):
    return z[0]


def perturbed(theta, along, scale):
    return fma(scale, along, theta)


def descended(theta, step, minus_lr, decay):
    return fma(minus_lr, step, mul(theta, decay))


# --- sums of directions, for AdaMeZO and every method without buffers ----------------------------
#   S1 = sum_k first_k z_k      S2 = sum_k second_k z_k^2      step = S1 / (sqrt(S2) + eps), or S1


def summed(total, value, coefficient):
    return fma(coefficient, value, total)


def preconditioned(s1, s2, eps):
    return div(s1, add(sqrt(s2), eps))


# --- Adam on the estimate p z, with both moments stored (the table of MeZO's authors' code) -------
#   m <- beta1 m + (1 - beta1) p z        v <- beta2 v + (1 - beta2) p^2 z^2
#   step = c1 m / (sqrt(c2 v) + eps)      with c = 1 / (1 - beta^t)


def adam_step(z, b, n, eps):
    m = fma(n[1], z[0], mul(n[0], b[0]))
    v = fma(n[3], mul(z[0], z[0]), mul(n[2], b[1]))
    return div(mul(n[4], m), add(sqrt(mul(n[5], v)), eps)), m, v


# --- HiZOO (arXiv 2402.15173): D is a curvature, and perturbations are shorter where it is large --
#   d = z / sqrt(D)      D <- D + D (a c z^2 - a), within bounds      step = p z / sqrt(D)
# where c is the curvature along d. The bounds keep d finite, whatever c was; float16 holds both.


def hizoo_direction(z, b, n):
    return div(z[0], sqrt(b[0]))


def hizoo_bound(z, b, n):
    # The lower clip of hizoo_step, which bfloat16 may round down.
    least = 1e-4 * (1 - 2.0**-7) if b is None else b[0].least()
    return z / math.sqrt(least) if least > 0 else math.inf if least <= 0 else math.nan


def hizoo_step(z, b, n, eps):
    change = fma(n[1], mul(z[0], z[0]), n[0])
    moved = fma(b[0], change, b[0])
    curvature = smaller(larger(moved, 1e-4), 1e4)
    return div(mul(n[2], z[0]), sqrt(curvature)), curvature


# --- HELENE (arXiv 2411.10696): momentum over a clipped Gauss-Newton curvature --------------------
#   m <- beta1 m + alpha p z      h <- beta2 h + (1 - beta2) B p_hat^2 z^2
#   step = m / (gamma max(h, lambda) + eps)


def helene_step(z, b, n, eps):
    m = fma(n[1], z[0], mul(n[0], b[0]))
    h = fma(n[3], mul(z[0], z[0]), mul(n[2], b[1]))
    return div(m, add(mul(n[4], larger(h, n[5])), eps)), m, h


# --- ZO-AdaMU (arXiv 2312.15184): the direction itself has momentum; m is the last one ------------
#   z' = sqrt(alpha) u_0      z'' = m + sqrt(1 - alpha) u_1      d = beta1 z' + (1 - beta1) z''
#   step = p d / sqrt(beta2 z'^2 + (1 - beta2) z''^2 + eps)      m <- d


def adamu_parts(z, b, n):
    fresh = mul(n[0], z[0])
    moving = fma(n[1], z[1], b[0])
    return fresh, moving, fma(n[2], fresh, mul(n[3], moving))


def adamu_direction(z, b, n):
    return adamu_parts(z, b, n)[2]


def adamu_bound(z, b, n):
    fresh, moving, beta, rest = n[:4].tolist()
    if b is None:
        # m <- beta1 z' + (1 - beta1) z'', and beta1 has never been smaller than now: |m| is at most
        # |z| + (1 - beta1) |m|, rounded to bfloat16.
        grows = 1 + 2.0**-7
        largest = grows * z / (1 - grows * rest) if grows * rest < 1 else math.inf
    else:
        largest = b[0].largest()
    return beta * fresh * z + rest * (largest + moving * z)


def adamu_step(z, b, n, eps):
    fresh, moving, both = adamu_parts(z, b, n)
    v = fma(n[4], mul(fresh, fresh), mul(n[5], mul(moving, moving)))
    return div(mul(n[6], both), sqrt(add(v, eps))), both


# --- blend: perturbs from one direction to the next in one pass; it has no update ----------------
#   d = n_0 z_0 + n_1 z_1


def blend_direction(z, b, n):
    return fma(n[1], z[1], mul(n[0], z[0]))


def blend_bound(z, b, n):
    return z * sum(map(abs, n[:2].tolist()))


RULES = {
    "moments": Rule(0, 0, (), step=preconditioned),
    "adam": Rule(
        1,
        2,
        ("beta1", "(1 - beta1) p", "beta2", "(1 - beta2) p^2", "correction1", "correction2"),
        step=adam_step,
        noop={0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0},
    ),
    "hizoo": Rule(
        1,
        1,
        ("-alpha", "alpha curvature", "p"),
        direction=hizoo_direction,
        bound=hizoo_bound,
        step=hizoo_step,
        noop={0: 0.0, 1: 0.0, 2: 0.0},
    ),
    "helene": Rule(
        1,
        2,
        ("beta1", "alpha p", "beta2", "(1 - beta2) batch p_hat^2", "gamma", "clip"),
        step=helene_step,
        noop={0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0},
    ),
    "adamu": Rule(
        2,
        1,
        ("sqrt(alpha)", "sqrt(1 - alpha)", "beta1", "1 - beta1", "beta2", "1 - beta2", "p"),
        direction=adamu_direction,
        bound=adamu_bound,
        step=adamu_step,
    ),
    "blend": Rule(2, 0, ("of z_0", "of z_1"), direction=blend_direction, bound=blend_bound),
}
"""The rules by name, in the order of csrc/adamezo/buffered.h. "moments" is the rule of `update_`:
it takes any number of directions, and its step is a function of their sums."""
