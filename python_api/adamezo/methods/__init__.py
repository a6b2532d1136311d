"""The methods, one file each: where a rule evaluates the loss, and what it does with that."""

from .adamezo import AdaMeZO

__all__ = ["AdaMeZO"]
