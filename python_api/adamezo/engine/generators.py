"""Random numbers that a closure draws: the same for all evaluations of a step."""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack
from typing import Any

import torch


class ForkedGenerators:
    """A context in which random generators advance as usual; on leaving they are set back.

    These are the generators of torch, on all devices in use, and the global ones of Python
    (``random``) and numpy (``numpy.random``). Generators that somebody made (``torch.Generator``,
    ``random.Random``, ``numpy.random.default_rng``) are not known here, and go on.
    """

    def __enter__(self) -> None:
        # All devices: a trained CPU tensor may feed a frozen model on a GPU, with dropout there.
        self._devices = ExitStack()
        for kind in ("cuda", "xpu"):
            module = torch.get_device_module(kind)
            if module.is_initialized():
                # In a capture torch refuses to tell a generator's state (docs/cuda_graphs.md).
                if kind == "cuda" and torch.cuda.is_current_stream_capturing():
                    continue
                devices = range(module.device_count())
                fork = torch.random.fork_rng(devices, device_type=kind)
                self._devices.enter_context(fork)
        # The module numpy may be imported before its generators are. They must not be imported in
        # the evaluation: nobody would know how the generator began that it draws from.
        self._numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
        self._of_numpy = None if self._numpy is None else self._numpy.get_state(legacy=False)
        self._of_python = random.getstate()
        self._of_torch = torch.get_rng_state()

    def __exit__(self, *error: object) -> None:
        try:
            torch.set_rng_state(self._of_torch)
            random.setstate(self._of_python)
            if self._numpy is not None:
                self._numpy.set_state(_as_list(self._of_numpy))
        finally:
            self._devices.close()


def _as_list(state: Any) -> Any:
    """The state with its key as a list, which numpy takes in a third of the time: it reads the key
    element by element."""
    if state["bit_generator"] == "MT19937":  # a user may have set another one
        state["state"]["key"] = state["state"]["key"].tolist()
    return state
