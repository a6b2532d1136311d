"""The optimizer of a run, of any method."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from .. import methods
from ..engine.optimizer import ZerothOrder
from ..engine.options import kinds_of
from .options import METHOD_OPTIONS, Options

_NOT_OPTIONS = {"params", "own", "common", "model", "differentiable", "return"}


def make_optimizer(options: Options, model: nn.Module, batches: int) -> ZerothOrder:
    """The optimizer that the options describe, of all that a model trains.

    Args:
        options: where one of METHOD_OPTIONS is None, the method has its default.
        model: with or without adapters.
        batches: how many there are in a pass over the data, which a schedule may go by.

    Raises:
        ValueError: the method has no such option, or refuses its value.
    """
    if options.method not in methods.__all__:
        raise ValueError(
            f"--method: got {options.method!r}, expected one of {', '.join(methods.__all__)}"
        )
    method: Any = getattr(methods, options.method)
    chosen = {name: getattr(options, name) for name in METHOD_OPTIONS}
    given = {name: value for name, value in chosen.items() if value is not None}
    both = given.keys() & options.method_option.keys()
    if both:
        raise ValueError(f"--method-option {min(both)}: it is given by its own option too")
    given |= options.method_option
    if method is methods.AdaZeta:
        epochs = max(2, math.ceil(options.steps / batches))
        given = methods.AdaZeta.schedule(batches, epochs) | given
    accepted = kinds_of(method).keys() - _NOT_OPTIONS
    for name in given:
        if name not in accepted:
            option = f"--{name}" if name in METHOD_OPTIONS else f"--method-option {name}"
            raise ValueError(
                f"{option.replace('_', '-')}: {options.method} has no such option, expected some "
                f"of {', '.join(sorted(accepted))}"
            )
    try:
        optimizer: ZerothOrder = method(
            [(name, p) for name, p in model.named_parameters() if p.requires_grad],
            model=model,
            seed=options.seed,
            weight_decay=options.weight_decay,
            perturbation=options.perturbation,
            rounding=options.rounding,
            **given,
        )
    except TypeError as error:
        raise ValueError(f"--method {options.method}: {error}") from error
    return optimizer


def with_defaults(options: Options, optimizer: ZerothOrder) -> Options:
    """The options with those of METHOD_OPTIONS that the method has its defaults of."""
    found: dict[str, Any] = {
        name: optimizer.defaults[name]
        for name in METHOD_OPTIONS
        if getattr(options, name) is None and name in optimizer.defaults
    }
    return replace(options, **found)
