"""Attacks on a run: interruptions, bad input, damaged files, SIGKILL. `python -m tests.stress`."""

from .files import edited, fuzz_headers, fuzz_logs, fuzz_states, mutated, small_log
from .inputs import bad_inputs, bad_state, closures_that_write
from .interruptions import interrupted_by_signals, interrupted_inside
from .kills import cut_smollm2, kills, log_size, replay_speed
from .small import (
    OPTIONS,
    came_back,
    check_log,
    history,
    loss_of,
    make_optimizer,
    same_bits,
    small,
    values,
)

__all__ = [
    "OPTIONS",
    "bad_inputs",
    "bad_state",
    "came_back",
    "check_log",
    "closures_that_write",
    "cut_smollm2",
    "edited",
    "fuzz_headers",
    "fuzz_logs",
    "fuzz_states",
    "history",
    "interrupted_by_signals",
    "interrupted_inside",
    "kills",
    "log_size",
    "loss_of",
    "make_optimizer",
    "mutated",
    "replay_speed",
    "same_bits",
    "small",
    "small_log",
    "values",
]
