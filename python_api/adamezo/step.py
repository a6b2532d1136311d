"""One call that fine-tunes: the optimizer is made at a model's first step and kept with it."""

from __future__ import annotations

from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .methods import AdaMeZO
from .optimizer import Closure, set_lr
from .plain import plain

_DEFAULTS = {
    name: parameter.default
    for name, parameter in signature(AdaMeZO).parameters.items()
    if name not in ("params", "model")
}

_FOLLOWED = ("lr", "weight_decay")
"""Options that may change from call to call, as a schedule changes them from step to step."""

_optimizers: WeakKeyDictionary[nn.Module, AdaMeZO] = WeakKeyDictionary()
_options: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def fused_adamezo_step(model: nn.Module, closure: Closure, **options: Any) -> Tensor:
    """One AdaMeZO step on all of a model's trainable parameters.

    The optimizer is made at the model's first step and lives as long as the model does:
    :func:`optimizer_of` gives it, to look at, to save or to put a scheduler on, and
    :func:`forget_optimizer` starts anew.

    Args:
        model: its trainable parameters are stepped.
        closure: forward only, on the same batch each time it is called in a step, as the loss must
            depend on nothing but the weights; returns it. See :meth:`adamezo.AdaMeZO.step`.
        options: of :class:`adamezo.AdaMeZO`. ``lr`` and ``weight_decay`` count from the call on in
            which they are given another value than in the call before. All others are those of the
            model's first step: later calls may leave them out or repeat them.

    Returns:
        The mean of the two losses.

    Raises:
        TypeError: an option that AdaMeZO does not have.
        ValueError: an option other than lr and weight_decay differs from the first step's, or the
            model's parameters were replaced since; the message names them.
    """
    unknown = [name for name in options if name not in _DEFAULTS]
    if unknown:
        raise TypeError(
            f"unknown options: {', '.join(unknown)}. AdaMeZO has {', '.join(_DEFAULTS)}"
        )
    options = {k: v if isinstance(v, Tensor) else plain(v) for k, v in options.items()}
    optimizer = _optimizers.get(model)
    if optimizer is None:
        optimizer = AdaMeZO.for_model(model, **options)
        _optimizers[model], _options[model] = optimizer, {**_DEFAULTS, **options}
    last = _options[model]
    changed = {k: v for k, v in options.items() if last[k] is not v and last[k] != v}
    fixed = [
        f"{name} (was {last[name]!r}, got {value!r})"
        for name, value in changed.items()
        if name not in _FOLLOWED
    ]
    if fixed:
        raise ValueError(
            f"options changed since the model's first step: {', '.join(fixed)}. Only "
            f"{' and '.join(_FOLLOWED)} may change in a call. Start anew with "
            "`adamezo.forget_optimizer(model)`, or change `optimizer_of(model).param_groups`"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [name for name, p in model.named_parameters() if id(p) not in known]
    if new:
        raise ValueError(
            f"parameters were added or replaced since the model's first step: {', '.join(new)}. "
            "Start anew with `adamezo.forget_optimizer(model)`"
        )
    for group in optimizer.param_groups if changed else ():
        optimizer.check_options({**group, **changed})
    for name, value in changed.items():
        for group in optimizer.param_groups:
            if name == "lr":
                set_lr(group, float(value))
            else:
                group[name] = value
        last[name] = value
    return optimizer.step(closure)


def optimizer_of(model: nn.Module) -> AdaMeZO:
    """The optimizer with which :func:`fused_adamezo_step` steps a model.

    Raises:
        ValueError: it has not stepped this model yet.
    """
    optimizer = _optimizers.get(model)
    if optimizer is None:
        raise ValueError(
            f"fused_adamezo_step has not stepped this {type(model).__name__} yet: its first step "
            "makes the optimizer. To have one before, make an AdaMeZO.for_model(model, ...) and "
            "call its step"
        )
    return optimizer


def forget_optimizer(model: nn.Module) -> None:
    """Lets :func:`fused_adamezo_step` begin anew with a model, with no history and with the options
    of the next call. The weights stay as they are. Nothing happens if it has not stepped it."""
    _optimizers.pop(model, None)
    _options.pop(model, None)
