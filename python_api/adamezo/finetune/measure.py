"""Peak memory of this process, and time that includes queued GPU work."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch


def now(device: torch.device) -> float:
    """Seconds on a steady clock, after everything queued on ``device`` has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """Peak memory in bytes since :meth:`reset`.

    On a GPU what torch had allocated; on a CPU the resident set of the process (Linux only:
    elsewhere :meth:`read` returns None, because the peak cannot be reset there).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kind = "cuda allocated" if device.type == "cuda" else "resident set"

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5 = reset VmHWM
        except OSError:
            self.kind = "not measured"

    def read(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self.kind == "not measured":
            return None
        kib = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(kib.group(1)) * 1024 if kib else None
