"""One file for each outside library, imported only when used."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """``ZOTrainer`` and ``ZOTrainerMixin``, whose module imports transformers."""
    if name in ("ZOTrainer", "ZOTrainerMixin"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
