"""How fast a core really runs, so that seconds can be told in cycles."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# A chain of register additions, each of which needs the one before it: one cycle each on every core
# that we know. The empty assembly keeps the compiler from folding the chain; a register and not a
# constant is added, because some cores eliminate constant additions at rename.
_SOURCE = """
#include <stdint.h>
#include <time.h>
#define ADD x += y; __asm__ volatile("" : "+r"(x));
#define ADD8 ADD ADD ADD ADD ADD ADD ADD ADD
double additions_per_second(uint64_t rounds, uint64_t y) {
    uint64_t x = 0;
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (uint64_t i = 0; i < rounds; ++i) { ADD8 ADD8 ADD8 ADD8 ADD8 ADD8 ADD8 ADD8 }
    clock_gettime(CLOCK_MONOTONIC, &b);
    return 64.0 * (double)rounds
        / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
}
"""


@functools.lru_cache(maxsize=1)
def core_clock() -> tuple[float | None, str]:
    """Hertz of a busy core and how that was found: measured, or /proc/cpuinfo, or (None, "")."""
    compiler = os.environ.get("CC") or next(
        filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None
    )
    if compiler:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "clock.so"
            built = subprocess.run(
                [*compiler.split(), "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)],
                input=_SOURCE,
                text=True,
                capture_output=True,
            )
            if built.returncode == 0:
                measure = ctypes.CDLL(str(library)).additions_per_second
                measure.restype = ctypes.c_double
                measure.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
                # About 1 ms a try, shorter than a time slice: the fastest was not interrupted.
                best = max(measure(50_000, 1) for _ in range(200))
                return best, "measured: dependent additions"
    try:
        found = re.search(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return (float(found.group(1)) * 1e6, "/proc/cpuinfo") if found else (None, "")
