"""MeZO and AdaMeZO with library calls alone: what the fused kernels are measured against.

Written from the formulas (MeZO, arXiv 2305.17333; AdaMeZO, arXiv 2605.00650), twice:

- `Fair`: in place, one buffer each for z, m, v and the weights in float32, every call in the form
  that torch is fastest at. All ratios are against this one: "pure torch" below and in the docs.
- `AsReleased`: as the released codes go about it, `param.data = param.data + scale * z * zo_eps`
  with a fresh z and fresh moments, all in the weights' own type.

All regenerate z from a generator reseeded for each direction, tensor after tensor, on the device
where the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Update:
    """What an update is given, the newest direction first: theta += restore * z_0, then
    theta <- theta (1 - lr wd) - lr m / (sqrt(v) + eps)."""

    seeds: Sequence[int]
    first: Sequence[float]
    """Coefficients of z in m."""
    second: Sequence[float] | None
    """Coefficients of z^2 in v."""
    lr: float
    eps: float = 1e-8
    weight_decay: float = 0.0
    restore: float = 0.0

    def generators(self, device: torch.device) -> list[torch.Generator]:
        return [torch.Generator(device).manual_seed(seed) for seed in self.seeds]


class LibraryCalls:
    """The two operations over a list of tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self._device = self.tensors[0].device

    def perturb_(self, seed: int, scale: float) -> None:
        raise NotImplementedError

    def update_(self, of: Update) -> None:
        raise NotImplementedError


class Fair(LibraryCalls):
    """The two operations over a list of tensors, in place, with library calls at their best.

    z is drawn in float32, whatever the weights' type: torch's generator is fastest there, and gives
    the same stream. On a CPU 16-bit weights are cast to float32 and back in whole passes, as
    torch's arithmetic on mixed types is ten times slower there than a cast and an arithmetic on one
    type.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        largest = max(t.numel() for t in self.tensors)
        self._z = torch.empty(largest, device=self._device)
        self._m: Tensor | None = None
        self._v: Tensor | None = None
        low = {t.dtype for t in self.tensors} - {torch.float32}
        if self._device.type != "cpu":
            low = set()
        self._low = {d: torch.empty(largest, dtype=d, device=self._device) for d in low}
        self._weights = torch.empty_like(self._z) if low else None

    @torch.no_grad()
    def perturb_(self, seed: int, scale: float) -> None:
        """theta += scale * z, z rounded to the weights' type as the released codes have it."""
        generator = torch.Generator(self._device).manual_seed(seed)
        for theta in self.tensors:
            z = self._z[: theta.numel()].view_as(theta).normal_(generator=generator)
            self._add(theta, z, scale)

    @torch.no_grad()
    def update_(self, of: Update) -> None:
        first, second = of.first, of.second
        if second is None and len(first) == 1 and not of.weight_decay:
            # MeZO: restore and update are one multiple of the same z.
            self.perturb_(of.seeds[0], of.restore - of.lr * first[0])
            return
        generators = of.generators(self._device)
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
                if age == 0 and of.restore:
                    self._add(theta, z, of.restore)
                m.add_(z, alpha=first[age])
                if v is not None and second is not None:
                    v.addcmul_(z, z, value=second[age])
            w = theta if self._weights is None else self._weights[:n].view(shape).copy_(theta)
            if of.weight_decay:
                w.mul_(1 - of.lr * of.weight_decay)
            if v is None:
                w.add_(m, alpha=-of.lr)
            else:
                w.addcdiv_(m, v.sqrt_().add_(of.eps), value=-of.lr)
            if w is not theta:
                theta.copy_(w)

    def _add(self, theta: Tensor, z: Tensor, scale: float) -> None:
        if theta.dtype in self._low:
            z = self._low[theta.dtype][: theta.numel()].view_as(theta).copy_(z)
        theta.add_(z, alpha=scale)


class AsReleased(LibraryCalls):
    """The same two operations as the released codes write them, temporaries and all."""

    @torch.no_grad()
    def perturb_(self, seed: int, scale: float) -> None:
        """theta = theta + scale * z, a new tensor each time."""
        torch.manual_seed(seed)
        for theta in self.tensors:
            theta.data = theta.data + scale * _new_normal(theta)

    @torch.no_grad()
    def update_(self, of: Update) -> None:
        """Restores in a pass of its own."""
        if of.restore:
            self.perturb_(of.seeds[0], of.restore)
        generators = of.generators(self._device)
        for theta in self.tensors:
            m = v = None
            for age, generator in enumerate(generators):
                z = _new_normal(theta, generator)
                m = of.first[age] * z if m is None else m + of.first[age] * z
                if of.second is not None:
                    v = of.second[age] * z**2 if v is None else v + of.second[age] * z**2
            u = m if of.second is None else m / (v.sqrt() + of.eps)
            theta.data = theta.data - of.lr * (u + of.weight_decay * theta.data)


def _new_normal(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.normal(
        0.0, 1.0, size=theta.shape, dtype=theta.dtype, device=theta.device, generator=generator
    )


@dataclass
class LibraryOptimizer:
    """A whole step of MeZO (horizon 1, betas (0, 0)) or AdaMeZO over `operations`."""

    operations: LibraryCalls
    lr: float = 1e-5
    betas: tuple[float, float] = (0.7, 0.9)
    eps: float = 1e-8
    zo_eps: float = 1e-3
    horizon: int = 10
    weight_decay: float = 0.0
    seed: int = 0
    """Of the next step."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """(seed, projected_grad) of at most `horizon` steps, the newest first."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Two forwards and an update; returns the mean of the two losses."""
        self.operations.perturb_(self.seed, self.zo_eps)
        above = closure().item()
        self.operations.perturb_(self.seed, -2 * self.zo_eps)
        below = closure().item()
        self.history.insert(0, (self.seed, (above - below) / (2 * self.zo_eps)))
        del self.history[self.horizon :]
        self.seed += 1
        seeds, projected_grads = zip(*self.history, strict=True)
        sums = coefficients(projected_grads, self.betas)
        options = (self.lr, self.eps, self.weight_decay, self.zo_eps)
        self.operations.update_(Update(seeds, *sums, *options))
        return (above + below) / 2
