"""What this machine can run, for the parameters of tests."""

from __future__ import annotations

import pytest

from adamezo_kernels.backends import native

INSTRUCTION_SETS = native.instruction_sets()  # none where nothing was compiled
needs_native = pytest.mark.skipif(
    not INSTRUCTION_SETS, reason="the compiled module is not here: run `pip install -e .`"
)
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
