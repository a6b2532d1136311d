"""Optimizers that accelerate has prepared. Nothing of accelerate is imported."""

from __future__ import annotations

from typing import Any

from ..engine.optimizer import ZerothOrder


def unwrapped(optimizer: Any) -> ZerothOrder:
    """The optimizer of this package inside of one that ``Accelerator.prepare`` returned.

    The prepared one returns None from ``step(closure)`` and hides ``losses``, ``measured`` and
    ``skipped``. Steps, options and states of both are the same.

    Raises:
        TypeError: there is none inside.
    """
    inner = optimizer
    while not isinstance(inner, ZerothOrder):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"expected an optimizer of adamezo, or one that accelerate has prepared of it; got "
                f"{type(optimizer).__name__}"
            )
    return inner
