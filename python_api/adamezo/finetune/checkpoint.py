"""Checkpoints: weights and optimizer at a place in a log, so that a run need not replay it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..engine.optimizer import ZerothOrder
from ..engine.ranks import Alone
from ..runlog import Place, StepLog


def beside(log: str | Path) -> Path:
    """The file of the checkpoint of a log."""
    return Path(f"{log}.checkpoint")


def save(optimizer: ZerothOrder, log: StepLog) -> None:
    """Writes what is trained and the optimizer's state, in one file that replaces the last. Of
    several ranks the first does."""
    if not (optimizer.ranks or Alone()).first:
        return
    path = beside(log.path)
    weights = [segment.tensor.detach() for plan in optimizer.plans() for segment in plan]
    content = {
        "place": tuple(log.place),
        "weights": weights,
        "optimizer": optimizer.state_dict(),
    }
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def at(path: Path, optimizer: ZerothOrder) -> tuple[Place, Callable[[], None]] | None:
    """Where in its log a checkpoint was written, and a function that loads it; None without one."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        place = Place(*content["place"])
    except Exception as error:  # of many kinds, by what is damaged
        raise ValueError(
            f"{path}: not a checkpoint, or damaged ({error}); remove it, and the log is replayed"
        ) from error
    return place, lambda: _load(content, optimizer)


def _load(content: dict[str, Any], optimizer: ZerothOrder) -> None:
    """Brings weights and optimizer to where they were. The log has been compared with both."""
    segments = [segment for plan in optimizer.plans() for segment in plan]
    with torch.no_grad():
        for segment, saved in zip(segments, content["weights"], strict=True):
            segment.tensor.copy_(saved)
    optimizer.load_state_dict(content["optimizer"])
