"""The record of a step: with the options of its groups, all that replays it bit for bit."""

from __future__ import annotations

import math
from typing import NamedTuple

from .arithmetic import usable

OUTCOMES = ("updated", "skipped", "failed", "broken")


class StepRecord(NamedTuple):
    """What a step did to the weights."""

    outcome: str
    """One of OUTCOMES. ``skipped``: a loss was not finite. ``failed``: the closure raised. Either
    way the weights were perturbed and restored. ``broken``: an operation on them failed half-way,
    and their values are not known."""
    direction: int
    """The 32-bit index of the step's first direction."""
    perturbations: int
    """How many perturbations were written into the weights before they were restored or updated.
    None where weights are perturbed out of place."""
    measured: tuple[float, ...]
    """The numbers that an update takes from the losses; empty where there was no update. For
    AdaMeZO ``(projected_grad,)``."""
    lrs: tuple[float, ...]
    """The learning rate of each group."""


def check_record(
    record: StepRecord, next_direction: int, probes: int, groups: int, measured: int
) -> None:
    """Raises ValueError unless a record can be that of the next step.

    Args:
        record: to be replayed.
        next_direction: the index of the next step's first direction.
        probes: how many evaluations a step has.
        groups: how many parameter groups there are.
        measured: how many numbers an update takes from the losses.
    """
    problem = None
    if record.outcome not in ("updated", "skipped", "failed"):
        problem = f"its outcome is {record.outcome!r}: the weights after it are not known"
    elif record.direction != next_direction:
        problem = f"its direction is {record.direction}, the next one is {next_direction}"
    elif not 0 <= record.perturbations <= probes:
        problem = f"it has {record.perturbations} perturbations, a step has {probes} at most"
    elif len(record.lrs) != groups:
        problem = f"it has {len(record.lrs)} learning rates for {groups} groups"
    elif not all(0 <= lr < math.inf for lr in record.lrs):
        problem = f"its learning rates are {record.lrs}"
    elif record.outcome == "updated" and len(record.measured) != measured:
        problem = f"it has {len(record.measured)} measured values, expected {measured}"
    elif record.outcome == "updated" and not usable(record.measured):
        problem = f"its measured values are {record.measured}"
    if problem is not None:
        raise ValueError(f"a record cannot be replayed: {problem}")
