"""AdaMeZO as a torch optimizer: Adam-style steps from forward passes, with no stored moments."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import DISTRIBUTIONS, PhiloxState, Plan, perturb_, update_
from adamezo_kernels.backends import BACKENDS, choose
from adamezo_kernels.plan import memory_of

from .history import NORMALIZATIONS, coefficients

Closure = Callable[[], Tensor | float]

# Options that the whole step shares: one direction, one pair of losses.
_SHARED_OPTIONS = ("zo_eps", "distribution", "fused", "seed")

# A projected gradient whose square float32 cannot hold is as useless as an infinite one.
_HUGE = 1e19


class AdaMeZO(torch.optim.Optimizer):
    r"""Zeroth-order fine-tuning with Adam's moments, truncated and regenerated (arXiv 2605.00650).

    A step evaluates the closure twice, at :math:`\theta + \mu z` and :math:`\theta - \mu z`, for a
    random direction z. With the projected gradient
    :math:`p = (L_+ - L_-) / (2 \mu)` it keeps one float and one direction index; the moments over
    the last ``horizon`` steps are summed up again from regenerated directions while the weights
    are restored and updated, in one pass and without a temporary::

        theta <- theta (1 - lr weight_decay) - lr m / (sqrt(v) + eps)

    where m and v are the sums of :mod:`adamezo.history`. MeZO is
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
            ones, on CUDA devices only; ``"rademacher"`` signs.
        maximize: ascend instead of descend (a reward, an accuracy), by group.
        fused: None uses the compiled kernels where there are some; True is an error without them;
            False uses the reference backend, which is plain torch and slow.
        seed: 64-bit key of all directions; None draws one from torch's default generator.
        differentiable: refused; a forward-only step has no graph.

    Both evaluations see the same random numbers (dropout masks included), and leave torch's
    generators where one evaluation would have: directions are not drawn from them.

    If the closure raises, the weights are restored (up to rounding, as they were perturbed in
    place) and nothing else has happened. If a loss is not finite the weights are restored, the
    step is left out of the history and counted in ``skipped``.

    Attributes:
        projected_grad (float): p of the last step.
        losses (tuple[float, float]): the losses of the last step, at +mu and -mu.
        skipped (int): steps left out because of a non-finite loss, since this object was made or
            a state was loaded into it.
    """

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
        maximize: bool = False,
        fused: bool | None = None,
        seed: int | None = None,
        differentiable: bool = False,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not possible: a step uses no gradients")
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
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
                maximize=maximize,
                fused=fused,
                seed=seed,
            ),
        )
        self._forget_last_step()

    def _forget_last_step(self) -> None:
        self.projected_grad = math.nan
        self.losses = (math.nan, math.nan)
        self.skipped = 0
        self._layout: tuple[Any, list[Plan]] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_last_step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters. Their history begins now: earlier directions never moved them."""
        shared = self.param_groups[0] if self.param_groups else self.defaults
        options = {
            **self.defaults,
            **{name: shared[name] for name in _SHARED_OPTIONS},
            **param_group,
        }
        _check_options(options)
        for name in _SHARED_OPTIONS:
            if options[name] != shared[name]:
                raise ValueError(
                    f"{name} is {shared[name]!r} for the whole step, a group cannot set it to "
                    f"{options[name]!r}"
                )
            param_group[name] = shared[name]  # not the default: a loaded state has its own
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Plain lists of numbers in the group, the newest first: that is what survives every way of
        # saving and loading. They are replaced, never changed, as a state_dict shares them.
        group["directions"] = []
        group["projected_grads"] = []
        group["steps"] = 0
        group["next_direction"] = self.param_groups[0].get("next_direction", 0)
        if group["fused"]:
            self._backend(group, group["params"])

    @overload  # type: ignore[override]  # torch's closures return floats, ours tensors too
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> Tensor: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:
        """One step; two evaluations of ``closure``.

        Args:
            closure: evaluates the model without gradients on the same batch each time and returns
                the loss as a scalar tensor or a number. Without a closure nothing happens and
                None is returned (frameworks call ``step()`` to initialize state).

        Returns:
            The mean of the two losses, a scalar tensor.
        """
        if closure is None:
            return None
        groups = self.param_groups
        shared = self._shared_options()
        zo_eps, distribution = shared["zo_eps"], shared["distribution"]
        direction = groups[0]["next_direction"]
        newest = PhiloxState(shared["seed"], direction)
        plans = self._plans()
        backend = self._backend(shared, [p for group in groups for p in group["params"]])

        displacement = [0.0] * len(groups)  # of each group's weights, in units of z

        def displace(to: float) -> None:
            with _interrupts_later():
                for i, plan in enumerate(plans):
                    if displacement[i] != to:
                        perturb_(
                            plan,
                            newest,
                            to - displacement[i],
                            distribution=distribution,
                            backend=backend,
                        )
                        displacement[i] = to
            # Inside torch.autocast a closure would else read casts of the weights as they were.
            torch.clear_autocast_cache()

        try:
            displace(zo_eps)
            with _forked_generators():
                result = closure()
                loss_plus = _loss_value(result)
            displace(-zo_eps)
            result = closure()
            loss_minus = _loss_value(result)
            self.losses = (loss_plus, loss_minus)
            self.projected_grad = (loss_plus - loss_minus) / (2 * zo_eps)
            for group in groups:
                group["next_direction"] = direction + 1
            if abs(self.projected_grad) < _HUGE:
                with _interrupts_later():
                    for i, (group, plan) in enumerate(zip(groups, plans, strict=True)):
                        self._update(group, plan, newest, backend)
                        displacement[i] = 0.0
            else:
                self._skip()
        finally:
            displace(0.0)
        like = result if isinstance(result, Tensor) and result.is_floating_point() else None
        return torch.tensor(
            (loss_plus + loss_minus) / 2,
            dtype=None if like is None else like.dtype,
            device=None if like is None else like.device,
        )

    def _update(self, group: dict[str, Any], plan: Plan, newest: PhiloxState, backend: str) -> None:
        """Restores the group's weights and steps; then the group's history has advanced."""
        horizon = group["horizon"]
        grads = [self.projected_grad, *group["projected_grads"]][:horizon]
        directions = [newest.counter, *group["directions"]][:horizon]
        if group["warmup_lr"] is not None and group["steps"] <= horizon:
            lr, first, second = group["warmup_lr"], grads[:1], None
        else:
            lr = float(group["lr"])
            first, second = coefficients(grads, group["betas"], group["normalization"])
        if group["maximize"]:
            first = [-value for value in first]
        update_(
            plan,
            [newest._replace(counter=counter) for counter in directions[: len(first)]],
            first,
            second,
            lr=lr,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            restore=group["zo_eps"],
            distribution=group["distribution"],
            backend=backend,
        )
        group["projected_grads"], group["directions"] = grads, directions
        group["steps"] += 1

    def _skip(self) -> None:
        self.skipped += 1
        if self.skipped == 1:
            warnings.warn(
                f"the losses of a step were {self.losses}: the weights are restored and the step "
                "is skipped. Later ones are only counted, in `skipped`",
                RuntimeWarning,
                stacklevel=5,  # the caller of step, above torch's two wrappers around it
            )

    def _shared_options(self) -> dict[str, Any]:
        """The options of the whole step, read anew as a user may have set them in the groups."""
        first = self.param_groups[0]
        for name in (*_SHARED_OPTIONS, "next_direction"):
            values = [group[name] for group in self.param_groups]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} must be the same in all parameter groups, got {values}")
        return {name: first[name] for name in _SHARED_OPTIONS}

    def _plans(self) -> list[Plan]:
        """A plan for each group, made again when a parameter has been replaced, moved or frozen."""
        layout = [
            # Frozen ones may be of a kind that has no address, such as sparse.
            [(id(p), p.requires_grad and memory_of(p)) for p in params]
            for params in (group["params"] for group in self.param_groups)
        ]
        if self._layout is None or self._layout[0] != layout:
            self._layout = layout, _make_plans(self.param_groups)
        return self._layout[1]

    def _backend(self, options: dict[str, Any], params: Sequence[Tensor]) -> str:
        fused, distribution = options["fused"], options["distribution"]
        if fused is False:
            return "reference"
        devices = {p.device for p in params if p.requires_grad}
        name: str = choose(devices, distribution=distribution).NAME
        if fused and name == "reference":
            reasons = "; ".join(f"{b}: {m.availability()[1]}" for b, m in BACKENDS.items())
            raise RuntimeError(
                f"fused=True, but no compiled kernels for {distribution!r} directions run on "
                f"{', '.join(map(str, devices))} here, or ADAMEZO_BACKEND forbids them "
                f"({reasons}). Pass fused=None to take the best there is"
            )
        return name


def _make_plans(groups: Iterable[dict[str, Any]]) -> list[Plan]:
    """Trainable parameters of each group. A parameter's index counts all of them, frozen ones too,
    so that freezing one does not change the others' directions."""
    members: list[tuple[list[Tensor], list[int], list[str]]] = []
    seen = set()
    index = 0
    for group in groups:
        tensors, parameters, names = [], [], []
        given = group.get("param_names")
        for i, p in enumerate(group["params"]):
            # Two Parameters over the same memory are one weight, and must move once.
            if p.requires_grad and (p.numel() == 0 or memory_of(p) not in seen):
                seen.add(memory_of(p))
                tensors.append(p)
                parameters.append(index)
                names.append(given[i] if given else f"parameter {index}")
            index += 1
        members.append((tensors, parameters, names))
    plans = [
        Plan(tensors, parameters=parameters, names=names) for tensors, parameters, names in members
    ]
    if len(plans) > 1:  # also across groups no two may share memory
        tensors, parameters, names = (sum(lists, []) for lists in zip(*members, strict=True))
        Plan(tensors, parameters=parameters, names=names)
    return plans


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """A Ctrl-C inside takes effect on leaving: what the kernels did to the weights is then known,
    and so can be undone."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # there is no handler of Python's, or none that would run in this thread
        return
    interrupts = []
    signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _forked_generators() -> Iterator[None]:
    """Inside, torch's generators advance as usual; on leaving they are back where they were."""
    # All devices in use: a trained CPU tensor may feed a frozen model on a GPU, with dropout there.
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for kind in ("cuda", "xpu"):
            module = torch.get_device_module(kind)
            if module.is_initialized():
                devices = range(module.device_count())
                stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        yield


def _loss_value(loss: Any) -> float:
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"the closure must return one real number, got a tensor of shape "
                f"{tuple(loss.shape)} and dtype {loss.dtype}: reduce it, for example by `mean()`"
            )
        return float(loss)
    if isinstance(loss, (int, float)):
        return float(loss)
    raise TypeError(
        f"the closure must return the loss as a scalar tensor or a number, got "
        f"{type(loss).__name__}" + (": does it lack a `return`?" if loss is None else "")
    )


def _check_options(options: dict[str, Any]) -> None:
    """torch's own messages where torch has one."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    betas = options["betas"]
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: expected (beta1, beta2), got {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    # Not 0: a z that is exactly 0 would give 0 / 0.
    if not 0.0 < options["eps"] < math.inf:
        raise ValueError(f"Invalid epsilon value: {options['eps']}")
    if not 0.0 <= options["weight_decay"] < math.inf:
        raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
    if not 0.0 < options["zo_eps"] < math.inf:
        raise ValueError(f"Invalid zo_eps value: {options['zo_eps']}")
    horizon = options["horizon"]
    if not isinstance(horizon, int) or isinstance(horizon, bool) or horizon < 1:
        raise ValueError(f"Invalid horizon value: {horizon}, expected an integer of at least 1")
    if options["normalization"] not in NORMALIZATIONS:
        raise ValueError(
            f"Invalid normalization: {options['normalization']!r}, expected one of {NORMALIZATIONS}"
        )
    warmup_lr = options["warmup_lr"]
    if warmup_lr is not None and not 0.0 <= warmup_lr < math.inf:
        raise ValueError(f"Invalid warmup_lr value: {warmup_lr}")
    if options["distribution"] not in DISTRIBUTIONS:
        raise ValueError(
            f"Invalid distribution: {options['distribution']!r}, expected one of {DISTRIBUTIONS}"
        )
    seed = options["seed"]
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"Invalid seed: {seed!r}, expected an integer in [0, 2**64)")
