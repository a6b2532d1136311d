"""Random numbers that torch does not draw: the global generators of Python and of numpy."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def forked_host_generators() -> Iterator[None]:
    """Inside, ``random`` and ``numpy.random`` advance as usual; on leaving they are back where they
    were. Generators that somebody made (``random.Random``, ``numpy.random.default_rng``) are not
    known here, and stay where they have come to."""
    python, numpy = random.getstate(), _numpy_random()
    state = None if numpy is None else numpy.get_state(legacy=False)
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(_listed(state))


def _numpy_random() -> Any:
    """The module, if numpy is in use. torch itself loads numpy where it is installed."""
    # Of a loaded numpy it may be loaded only now. Not in the evaluation, which would draw from a
    # generator of which nobody knows how it began.
    return getattr(sys.modules.get("numpy"), "random", None)


def _listed(state: Any) -> Any:
    """The same, for numpy to take it three times as fast: it takes element by element."""
    if state["bit_generator"] == "MT19937":  # a user may have set another one
        state["state"]["key"] = state["state"]["key"].tolist()
    return state
