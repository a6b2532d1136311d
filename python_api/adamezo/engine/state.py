"""Checks of a saved state, before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

COUNTERS = ("next_direction", "skipped_in_a_row")
"""Counters that all groups share: the index of the next step's first direction, and how many steps
have been skipped since the last one that was not."""

# Put into a group by torch, its schedulers and libraries that wrap the optimizer.
_NOT_SAVED = ("params", "param_names", "initial_lr")

_LIMITS = {"steps": 2**63, "next_direction": 2**32, "skipped_in_a_row": 2**63}


def check_saved_group(
    saved: dict[str, Any],
    group: dict[str, Any],
    where: str,
    fixed_options: Sequence[str],
    check_options: Callable[[dict[str, Any]], None],
) -> None:
    """Raises ValueError unless a saved parameter group can go on as ``group``.

    Args:
        saved: the group of the state.
        group: the optimizer's.
        where: names the saved group in messages.
        fixed_options: those that both must share.
        check_options: of the optimizer, for the saved options.
    """
    missing = [name for name in group if name not in saved and name not in _NOT_SAVED]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}: it is of another optimizer, or of an earlier "
            "version of this one"
        )
    for name in fixed_options:
        if saved[name] != group[name]:
            raise ValueError(
                f"{where} has {name} {saved[name]!r}, this optimizer has {group[name]!r}: a "
                f"run keeps its {name} from its first step to its last"
            )
    for name, value in saved.items():
        if isinstance(value, int) and abs(value) >= 2**64:
            raise ValueError(f"{where} is damaged: {name} is beyond 64 bits")
    try:
        check_options(saved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    for name, limit in _LIMITS.items():
        if type(saved[name]) is not int or not 0 <= saved[name] <= limit:
            raise ValueError(f"{where} is damaged: {name} is {saved[name]!r}")
