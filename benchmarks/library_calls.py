"""MeZO and AdaMeZO with library calls alone: what the fused kernels are measured against.

Written from the formulas (MeZO, arXiv 2305.17333; AdaMeZO, arXiv 2605.00650), three times:

- `Fair`: in place, one buffer each for z, m, v and the weights in float32, every call in the form
  that torch is fastest at. All ratios are against this one: "pure torch" below and in the docs.
- `Plain`: in place too, but as one writes it without timing it: z in the weights' type, added to
  float32 sums.
- `AsReleased`: as the released codes go about it, `param.data = param.data + scale * z * zo_eps`
  with a fresh z and fresh moments, all in the weights' own type.

All regenerate z from a generator reseeded for each direction, tensor after tensor, on the device
where the weights are. `StoredHessian` is HiZOO, for what a buffer as large as the weights costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def coefficients(
    projected_grads: Sequence[float], betas: tuple[float, float]
) -> tuple[list[float], list[float] | None]:
    """The paper's coefficients of z in m and of z^2 in v, newest first; None stands for v = 1."""
    beta1, beta2 = betas
    first = [(1 - beta1) * beta1**age * p for age, p in enumerate(projected_grads)]
    if beta2 == 0:
        return first, None
    return first, [(1 - beta2) * beta2**age * p * p for age, p in enumerate(projected_grads)]


class Update(NamedTuple):
    """What an update is given: theta += restore * z_0, then
    theta <- theta (1 - lr wd) - lr m / (sqrt(v) + eps)."""

    seeds: Sequence[int]
    first: Sequence[float]
    second: Sequence[float] | None
    lr: float
    eps: float
    weight_decay: float
    restore: float


class LibraryCalls:
    """The two operations over a list of tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self._device = self.tensors[0].device

    def perturb_(self, seed: int, scale: float) -> None:
        """theta += scale * z."""
        raise NotImplementedError

    def update_(
        self,
        seeds: Sequence[int],
        first: Sequence[float],
        second: Sequence[float] | None,
        *,
        lr: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        restore: float = 0.0,
    ) -> None:
        """The update from coefficients of z in m and of z^2 in v, newest first."""
        generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            self._update(Update(seeds, first, second, lr, eps, weight_decay, restore), generators)

    def _update(self, of: Update, generators: Sequence[torch.Generator]) -> None:
        raise NotImplementedError


class Fair(LibraryCalls):
    """The two operations over a list of tensors, in place, with library calls at their best.

    z is drawn in float32, whatever the weights' type: torch's generator is fastest there, and gives
    the same stream. 16-bit weights are cast to float32 and back in whole passes, as torch's
    arithmetic on mixed types is ten times slower than a cast and an arithmetic on one type.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        largest = max(t.numel() for t in self.tensors)
        self._z = torch.empty(largest, device=self._device)
        self._m: Tensor | None = None
        self._v: Tensor | None = None
        low = {t.dtype for t in self.tensors} - {torch.float32}
        self._low = {d: torch.empty(largest, dtype=d, device=self._device) for d in low}
        self._weights = torch.empty_like(self._z) if low else None

    @torch.no_grad()
    def perturb_(self, seed: int, scale: float) -> None:
        """theta += scale * z, z rounded to the weights' type as the released codes have it."""
        generator = torch.Generator(self._device).manual_seed(seed)
        for theta in self.tensors:
            z = self._z[: theta.numel()].view_as(theta).normal_(generator=generator)
            self._add(theta, z, scale)

    def _update(self, of: Update, generators: Sequence[torch.Generator]) -> None:
        seeds, first, second, lr, eps, weight_decay, restore = of
        if second is None and len(seeds) == 1 and not weight_decay:
            # MeZO: restore and update are one multiple of the same z.
            self.perturb_(seeds[0], restore - lr * first[0])
            return
        if self._m is None:
            self._m = torch.empty_like(self._z)
        if self._v is None and second is not None:
            self._v = torch.empty_like(self._z)
        for theta in self.tensors:
            n, shape = theta.numel(), theta.shape
            z, m = self._z[:n].view(shape), self._m[:n].view(shape).zero_()
            v = None if self._v is None else self._v[:n].view(shape).zero_()
            for age, generator in enumerate(generators):
                z.normal_(generator=generator)
                if age == 0 and restore:
                    self._add(theta, z, restore)
                m.add_(z, alpha=first[age])
                if v is not None and second is not None:
                    v.addcmul_(z, z, value=second[age])
            w = theta if self._weights is None else self._weights[:n].view(shape).copy_(theta)
            if weight_decay:
                w.mul_(1 - lr * weight_decay)
            if v is None:
                w.add_(m, alpha=-lr)
            else:
                w.addcdiv_(m, v.sqrt_().add_(eps), value=-lr)
            if w is not theta:
                theta.copy_(w)

    def _add(self, theta: Tensor, z: Tensor, scale: float) -> None:
        if theta.dtype in self._low:
            z = self._low[theta.dtype][: theta.numel()].view_as(theta).copy_(z)
        theta.add_(z, alpha=scale)


class Plain(LibraryCalls):
    """The two operations in place, z in a buffer of the weights' type, sums in float32."""

    @torch.no_grad()
    def perturb_(self, seed: int, scale: float) -> None:
        """theta += scale * z."""
        generator = torch.Generator().manual_seed(seed)
        for theta in self.tensors:
            theta.add_(torch.empty_like(theta).normal_(generator=generator), alpha=scale)

    def _update(self, of: Update, generators: Sequence[torch.Generator]) -> None:
        seeds, first, second, lr, eps, weight_decay, restore = of
        for theta in self.tensors:
            z = torch.empty_like(theta)
            m = torch.zeros(theta.shape)
            v = None if second is None else torch.zeros(theta.shape)
            for age, generator in enumerate(generators):
                torch.normal(0.0, 1.0, theta.shape, generator=generator, out=z)
                if age == 0 and restore:
                    theta.add_(z, alpha=restore)
                m.add_(z, alpha=first[age])
                if v is not None and second is not None:
                    v.addcmul_(z, z, value=second[age])
            if v is not None:
                m.div_(v.sqrt_().add_(eps))
            theta.mul_(1 - lr * weight_decay).add_(m, alpha=-lr)


class AsReleased(LibraryCalls):
    """The same two operations as the released codes write them, temporaries and all."""

    @torch.no_grad()
    def perturb_(self, seed: int, scale: float) -> None:
        """theta = theta + scale * z, a new tensor each time."""
        torch.manual_seed(seed)
        for theta in self.tensors:
            theta.data = theta.data + scale * _new_normal(theta)

    def _update(self, of: Update, generators: Sequence[torch.Generator]) -> None:
        """Restores in a pass of its own."""
        seeds, first, second, lr, eps, weight_decay, restore = of
        if restore:
            self.perturb_(seeds[0], restore)
        for theta in self.tensors:
            m = v = None
            for age, generator in enumerate(generators):
                z = _new_normal(theta, generator)
                m = first[age] * z if m is None else m + first[age] * z
                if second is not None:
                    v = second[age] * z**2 if v is None else v + second[age] * z**2
            u = m if second is None else m / (v.sqrt() + eps)
            theta.data = theta.data - lr * (u + weight_decay * theta.data)


def _new_normal(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.normal(
        0.0, 1.0, size=theta.shape, dtype=theta.dtype, device=theta.device, generator=generator
    )


class StoredHessian:
    """A whole step of HiZOO (arXiv 2402.15173): three forwards, and one float32 a weight kept.

    With D the stored diagonal (1 at first), p the projected gradient along z / sqrt(D)::

        D <- (1 - a) D + a abs(l+ + l- - 2 l) / (2 mu^2) D z^2
        theta <- theta - lr p z / sqrt(D)
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        *,
        lr: float = 1e-6,
        zo_eps: float = 1e-3,
        smoothing: float = 1e-8,
        seed: int = 0,
    ) -> None:
        self.tensors = list(tensors)
        self.lr, self.zo_eps, self.smoothing = lr, zo_eps, smoothing
        self.diagonals = [torch.ones_like(t, dtype=torch.float32) for t in self.tensors]
        self._next_seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Three forwards and an update; returns the loss at the weights themselves."""
        seed, mu = self._next_seed, self.zo_eps
        self._next_seed += 1
        at = closure().item()
        self._perturb_(seed, mu)
        above = closure().item()
        self._perturb_(seed, -2 * mu)
        below = closure().item()
        self._perturb_(seed, mu)
        projected_grad = (above - below) / (2 * mu)
        curvature = abs(above + below - 2 * at) / (2 * mu**2)
        torch.manual_seed(seed)
        for theta, d in zip(self.tensors, self.diagonals, strict=True):
            z = _new_normal(theta).float()
            d.mul_(1 - self.smoothing + self.smoothing * curvature * z**2)
            theta.data = (theta.data - self.lr * projected_grad * z / d.sqrt()).to(theta.dtype)
        return at

    def _perturb_(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for theta, d in zip(self.tensors, self.diagonals, strict=True):
            theta.data = (theta.data + scale * _new_normal(theta) / d.sqrt()).to(theta.dtype)


class LibraryOptimizer:
    """A whole step of MeZO (horizon 1, betas (0, 0)) or AdaMeZO over `operations`.

    `history` holds (seed, projected_grad), newest first, at most `horizon` of them.
    """

    def __init__(
        self,
        operations: LibraryCalls,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.7, 0.9),
        eps: float = 1e-8,
        zo_eps: float = 1e-3,
        horizon: int = 10,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.operations = operations
        self.lr, self.betas, self.eps = lr, betas, eps
        self.zo_eps, self.horizon, self.weight_decay = zo_eps, horizon, weight_decay
        self.history: list[tuple[int, float]] = []
        self._next_seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Two forwards and an update; returns the mean of the two losses."""
        seed = self._next_seed
        self._next_seed += 1
        self.operations.perturb_(seed, self.zo_eps)
        above = closure().item()
        self.operations.perturb_(seed, -2 * self.zo_eps)
        below = closure().item()
        self.history.insert(0, (seed, (above - below) / (2 * self.zo_eps)))
        del self.history[self.horizon :]
        seeds, projected_grads = zip(*self.history, strict=True)
        first, second = coefficients(projected_grads, self.betas)
        self.operations.update_(
            seeds,
            first,
            second,
            lr=self.lr,
            eps=self.eps,
            weight_decay=self.weight_decay,
            restore=self.zo_eps,
        )
        return (above + below) / 2
