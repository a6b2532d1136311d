"""Numbers as Python's own, whatever library they come from, so that every state stays loadable."""

from __future__ import annotations

import numbers
import operator
from typing import Any

from torch import Tensor

_AS_THEY_ARE = (bool, int, float, str, type(None))


def plain(value: Any) -> Any:
    """The same number as a bool, an int or a float of Python's.

    numpy's scalars and arrays without dimensions, tensors of one element, fractions and whatever
    else is registered with :mod:`numbers` are converted, also inside of tuples and lists. All else
    is returned as it is, for the checks of options to refuse.
    """
    if type(value) in _AS_THEY_ARE:
        return value
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's, but for its numbers
        return plain(value.item())
    return value


def make_plain(group: dict[str, Any]) -> None:
    """Converts the options of a parameter group in place. A learning rate that is a tensor stays
    one, as schedulers write into it."""
    for name, value in group.items():
        kind = type(value)
        if kind in _AS_THEY_ARE or name in ("params", "param_names"):
            continue
        if kind is tuple and all(type(item) in _AS_THEY_ARE for item in value):
            continue
        if kind is list:  # a history, whose numbers are plain already, or options from JSON
            continue
        if name != "lr" or not isinstance(value, Tensor):
            group[name] = plain(value)
