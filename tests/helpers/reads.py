"""What makes a program wait for a device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ReadBacks(TorchDispatchMode):
    """Counts what makes a program wait for the numbers of a device; and divisions by a number, for
    which torch's CUDA kernels have other bits."""

    waits = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_number = name.startswith("div") and not isinstance(args[1], torch.Tensor)
        if name in self.waits or by_number:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
