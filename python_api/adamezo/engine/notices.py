"""Warnings and errors of a step that concern the whole run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any


def warn_of_gradients(name: str, stacklevel: int) -> None:
    """Somebody calls ``backward()`` and a ``step()`` without a closure: nothing is trained."""
    warnings.warn(
        f"{name}.step() was called without a closure and did nothing, and parameters hold "
        f"gradients: somebody calls backward(), which {name} does not need, and expects "
        "step() to use them. The weights are not trained. Call step(closure), where the "
        "closure runs the model forward and returns the loss; in the place of "
        "transformers.Trainer, which calls step() by itself, take "
        "adamezo.integrations.ZOTrainer",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def warn_of_nothing_to_train(name: str, groups: Sequence[dict[str, Any]], stacklevel: int) -> None:
    """All parameters are frozen or empty, or there are none."""
    names = [
        names[i] if names else f"parameter {i} of group {k}"
        for k, group in enumerate(groups)
        for names in (group.get("param_names"),)
        for i in range(len(group["params"]))
    ]
    what = (
        f"all parameters are frozen or empty ({', '.join(names[:3])}"
        f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}): set requires_grad "
        "of those that are to be trained"
        if names
        else "there are no parameters: pass those that are to be trained"
    )
    warnings.warn(
        f"{name} evaluates the loss and moves nothing, as {what}",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def warn_of_ranks(name: str, stacklevel: int) -> None:
    """There are other processes, and the optimizer knows none of them."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            warnings.warn(
                f"torch.distributed has {ranks} ranks, and this {name} steps along the losses of "
                "its own: unless each rank has a run of its own, or averages its losses itself, "
                "call `adamezo.distributed.connect(optimizer)` once",
                UserWarning,
                stacklevel=stacklevel + 1,
            )


def tell_of_skipped_step(
    losses: Sequence[float], in_a_row: int, nonfinite: str, limit: int, first: bool, stacklevel: int
) -> None:
    """A step was skipped, as a loss was not finite.

    Args:
        losses: of the step.
        in_a_row: how many steps have been skipped since the last that was not.
        nonfinite, limit: the options ``nonfinite`` and ``max_skipped``.
        first: whether it is the first that is skipped at all, of which a warning tells.

    Raises:
        FloatingPointError: these options ask for it.
    """
    what = f"the losses of a step were {tuple(losses)}: the weights are restored and the step"
    if nonfinite == "raise":
        raise FloatingPointError(f"{what} left out. nonfinite='skip' would go on")
    if in_a_row >= limit:
        raise FloatingPointError(
            f"{what} skipped, as were the {in_a_row - 1} before it: the run is lost. Go back "
            "to an earlier state with a smaller lr or zo_eps, or set max_skipped"
        )
    if first:
        warnings.warn(
            f"{what} is skipped. Later ones are only counted, in `skipped`",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
