"""One call that fine-tunes: the optimizer is made at a model's first step and kept with it."""

from __future__ import annotations

from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .methods import AdaMeZO
from .optimizer import Closure

optimizers: WeakKeyDictionary[nn.Module, AdaMeZO] = WeakKeyDictionary()
"""The optimizer of each model that :func:`fused_adamezo_step` has stepped. It goes with the model.
Look at or change ``optimizers[model].param_groups``; ``del optimizers[model]`` starts anew."""

_DEFAULTS = {
    name: parameter.default
    for name, parameter in signature(AdaMeZO).parameters.items()
    if name not in ("params", "model")
}

_options: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def fused_adamezo_step(model: nn.Module, closure: Closure, **options: Any) -> Tensor:
    """One AdaMeZO step on all of a model's trainable parameters.

    Args:
        model: its trainable parameters are stepped.
        closure: forward only, on the same batch each time it is called in a step, as the loss must
            depend on nothing but the weights; returns it. See :meth:`adamezo.AdaMeZO.step`.
        options: of :class:`adamezo.AdaMeZO`, at the model's first step. Later calls may leave
            them out or repeat them.

    Returns:
        The mean of the two losses.

    Raises:
        TypeError: an option that AdaMeZO does not have.
        ValueError: an option differs from the first step's, or the model's parameters were
            replaced since; the message names them.
    """
    unknown = [name for name in options if name not in _DEFAULTS]
    if unknown:
        raise TypeError(
            f"unknown options: {', '.join(unknown)}. AdaMeZO has {', '.join(_DEFAULTS)}"
        )
    optimizer = optimizers.get(model)
    if optimizer is None:
        optimizer = AdaMeZO.for_model(model, **options)
        optimizers[model], _options[model] = optimizer, options
    kept = {**_DEFAULTS, **_options[model]}
    changed = [
        f"{name} (was {kept[name]!r}, got {value!r})"
        for name, value in options.items()
        if kept[name] != value
    ]
    if changed:
        raise ValueError(
            f"options changed since the model's first step: {', '.join(changed)}. Change them in "
            "`adamezo.step.optimizers[model].param_groups`, or start anew with "
            "`del adamezo.step.optimizers[model]`"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [name for name, p in model.named_parameters() if id(p) not in known]
    if new:
        raise ValueError(
            f"parameters were added or replaced since the model's first step: {', '.join(new)}. "
            "Start anew with `del adamezo.step.optimizers[model]`"
        )
    return optimizer.step(closure)
