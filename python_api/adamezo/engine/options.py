"""Options of parameter groups: plain numbers, the same for all groups where a step shares them."""

from __future__ import annotations

import functools
import math
import numbers
import operator
import types
from collections.abc import Sequence
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from adamezo_kernels import ROUNDINGS, kind_of
from adamezo_kernels.stream import NAMES_OF_DISTRIBUTIONS

from .perturb import PERTURBATIONS, perturbation_named

NONFINITE = ("skip", "raise")

_PLAIN = (bool, int, float, str, type(None))


def plain(value: Any) -> Any:
    """A number as Python's own bool, int or float, so that every state stays loadable.

    numpy's scalars and arrays without dimensions, tensors of one element, fractions and whatever
    else is registered with :mod:`numbers` are converted, also inside of tuples and lists. All else
    is returned as it is, for the checks of options to refuse.
    """
    if type(value) in _PLAIN:
        return value
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's other scalars
        return plain(value.item())
    return value


def rename_values(group: dict[str, Any]) -> None:
    """Gives the values of a parameter group's options today's names, in place."""
    if "perturbation" in group:
        group["perturbation"] = perturbation_named(group["perturbation"])


def make_plain(group: dict[str, Any]) -> None:
    """Converts the options of a parameter group in place. A learning rate that is a tensor stays
    one, as schedulers write into it."""
    for name, value in group.items():
        kind = type(value)
        if kind in _PLAIN or name in ("params", "param_names"):
            continue
        if kind is tuple and all(type(item) in _PLAIN for item in value):
            continue
        if kind is list:  # a history, whose numbers are plain already, or options from JSON
            continue
        if name != "lr" or not isinstance(value, Tensor):
            group[name] = plain(value)
    rename_values(group)


def shared(
    groups: Sequence[dict[str, Any]], names: Sequence[str], counters: Sequence[str] = ()
) -> dict[str, Any]:
    """Those options that all groups share, read anew as a user may have set them in the groups.

    Raises:
        ValueError: groups differ in one of them, or in one of the counters.
    """
    first = groups[0]
    for group in groups[1:]:
        for name in (*names, *counters):
            if group[name] != first[name]:
                values = [each[name] for each in groups]
                raise ValueError(f"{name} must be the same in all parameter groups, got {values}")
    return {name: first[name] for name in names}


class Common(TypedDict):
    """The options that every method has."""

    lr: float | Tensor
    weight_decay: float
    zo_eps: float
    distribution: str
    perturbation: str
    rounding: str
    nonfinite: str
    max_skipped: int
    maximize: bool
    fused: bool | None
    capturable: bool
    seed: int | None


@functools.cache
def kinds_of(method: type) -> dict[str, Any]:
    """The kind of each option of a method, as its constructors annotate their parameters."""
    kinds = get_type_hints(Common)
    for each in reversed(method.__mro__):
        constructor = vars(each).get("__init__")
        if isinstance(constructor, types.FunctionType):
            kinds.update(get_type_hints(constructor))
    return kinds


def is_of(value: Any, kind: Any) -> bool:
    """Whether an option is of a kind. An integer is a number; a truth value is neither."""
    origin, of = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(is_of(value, each) for each in of)
    if origin is tuple:  # a list, where it comes from JSON
        fits = isinstance(value, (tuple, list)) and len(value) == len(of)
        return fits and all(map(is_of, value, of))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind or (kind not in _PLAIN and isinstance(value, kind))


_WORDS = {
    float: "a number",
    int: "an integer",
    bool: "True or False",
    str: "a string",
    Tensor: "a tensor",
}


def _in_words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} values, each {_in_words(get_args(kind)[0])}"
    return " or ".join(_WORDS.get(each, "None") for each in get_args(kind) or (kind,))


def check_kinds(options: dict[str, Any], method: type) -> None:
    """Raises ValueError for an option of another kind than its annotation: "no" would be true."""
    for name, kind in kinds_of(method).items():
        if name in options and name != "params" and not is_of(options[name], kind):
            raise ValueError(f"Invalid {name}: {options[name]!r}, expected {_in_words(kind)}")


def check(options: dict[str, Any]) -> None:
    """Raises ValueError for an option that every method has, in torch's words where it has some."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= options["weight_decay"] < math.inf:
        raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
    if not 0.0 < options["zo_eps"] < math.inf:
        raise ValueError(f"Invalid zo_eps value: {options['zo_eps']}, expected a number above 0")
    for name, choices in (
        ("perturbation", PERTURBATIONS),
        ("rounding", ROUNDINGS),
        ("nonfinite", NONFINITE),
    ):
        value = perturbation_named(options[name]) if name == "perturbation" else options[name]
        if value not in choices:
            raise ValueError(f"Invalid {name}: {options[name]!r}, expected one of {choices}")
    try:
        kind_of(options["distribution"])
    except ValueError:
        raise ValueError(
            f"Invalid distribution: {options['distribution']!r}, expected one of "
            f"{NAMES_OF_DISTRIBUTIONS}"
        ) from None
    limit = options["max_skipped"]
    if limit < 1:
        raise ValueError(f"Invalid max_skipped: {limit!r}, expected an integer of at least 1")
    seed = options["seed"]
    if seed is None or not 0 <= seed < 2**64:
        raise ValueError(f"Invalid seed: {seed!r}, expected an integer in [0, 2**64)")
    if options["capturable"] and options["nonfinite"] == "raise":
        raise ValueError(
            "nonfinite='raise' with capturable=True: nothing looks at the losses on the "
            "device. Take 'skip' and look at `skipped`, or leave out capturable"
        )


def usual_lr(lr: Any) -> bool:
    """Whether a learning rate needs no other check, as those that schedulers set. One that is a
    tensor is not read: it may be on a device that is at work."""
    return isinstance(lr, Tensor) or (type(lr) in (int, float) and 0.0 <= lr < math.inf)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Sets the learning rate of a group, in place where it is a tensor, on a device perhaps."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
