"""oneMKL's generators of normals, the fastest that a CPU's vendor ships, beside ours.

They need `pip install mkl` (the extra `bench-mkl`), whose numbers nobody promises to be the same on
two machines. One thread, as everything that they are compared with.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# mkl_vsl_defines.h: the generators by their number times 2^20, and the fastest method for normals,
# the inverse of the cumulative distribution.
GENERATORS = {"ARS5": 15 << 20, "Philox": 16 << 20, "MT19937": 8 << 20}
INVERSE = 2
SEQUENTIAL = 1


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, on one thread; None where it is not installed."""
    for path in sorted(glob.glob(str(Path(sys.prefix, "lib", "libmkl_rt.so*")))):
        found = ctypes.CDLL(path)
        found.MKL_Set_Threading_Layer(SEQUENTIAL)
        return found
    return None


def normals(out: Tensor, generator: str) -> Callable[[], object]:
    """A call that fills ``out``, contiguous and float32, with the next normals of a generator.

    Raises:
        RuntimeError: the library has no such generator on this machine.
    """
    mkl, stream = library(), ctypes.c_void_p()
    assert mkl is not None
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    code = mkl.vslNewStream(
        ctypes.byref(stream), ctypes.c_int(GENERATORS[generator]), ctypes.c_uint(2026)
    )
    if code:
        raise RuntimeError(f"vslNewStream gave {code} for {generator}")

    def fill() -> None:
        address, mean, deviation = (
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_float(0),
            ctypes.c_float(1),
        )
        count = ctypes.c_int(out.numel())
        if mkl.vsRngGaussian(ctypes.c_int(INVERSE), stream, count, address, mean, deviation):
            raise RuntimeError(f"vsRngGaussian failed for {generator}")

    return fill
