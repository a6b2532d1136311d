"""The model that an optimizer was told of, where something needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def known_model(model: nn.Module | None, kind: type, needed_by: str) -> nn.Module:
    """The model. Raises ValueError if the optimizer does not know it."""
    if model is None:
        raise ValueError(
            f"{needed_by} needs the model that the closure evaluates: "
            f"{kind.__name__}.for_model(model, ...) or model=model, and after unpickling or "
            "copying the optimizer `optimizer.model = model`"
        )
    return model


def check_has_all(model: nn.Module, groups: Sequence[dict[str, Any]], needed_by: str) -> None:
    """Raises ValueError if the model lacks parameters of the optimizer."""
    known = {id(p) for p in model.parameters()}
    missing = []
    for i, group in enumerate(groups):
        if not all([id(p) in known for p in group["params"]]):
            names = group.get("param_names") or [
                f"parameter {k} of group {i}" for k in range(len(group["params"]))
            ]
            pairs = zip(names, group["params"], strict=True)
            missing += [name for name, p in pairs if id(p) not in known]
    if missing:
        more = f" and {len(missing) - 3} more" * (len(missing) > 3)
        raise ValueError(
            f"the model has no {', '.join(missing[:3])}{more}: with {needed_by} all parameters of "
            "the optimizer must be the model's. Was another model given, or was the optimizer made "
            "before the model was sharded, or while fully_shard had its weights gathered?"
        )
