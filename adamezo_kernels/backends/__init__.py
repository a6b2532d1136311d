"""What can run the operations, and which of them does.

A backend is a module with ``availability() -> (bool, reason)``, ``supports(device) -> bool`` and
the operations ``sample``, ``perturb``, ``update`` and ``moments`` on arguments that
:mod:`adamezo_kernels.ops` has checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import ModuleType

import torch

from . import native, reference

BACKENDS: dict[str, ModuleType] = {"native": native, "reference": reference}
"""By name, the preferred first."""


def choose(devices: Iterable[torch.device], name: str | None = None) -> ModuleType:
    """The backend for tensors on ``devices``.

    A backend that was named, in the call or by ``ADAMEZO_BACKEND``, is taken or refused, never
    replaced. Otherwise it is the first of BACKENDS that is available and supports the devices.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend is not available here, or does not support a device.
    """
    devices = set(devices)
    name = name or os.environ.get("ADAMEZO_BACKEND") or None
    if name is None:
        for backend in BACKENDS.values():
            if backend.availability()[0] and _supports(backend, devices):
                return backend
        raise RuntimeError(
            f"no backend supports tensors on {_text(devices)}: move them to a CPU or a CUDA device"
        )
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    available, reason = backend.availability()
    if not available:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if not _supports(backend, devices):
        raise RuntimeError(
            f"backend {name!r} does not support tensors on {_text(devices)}; name none, "
            "and the best one that does is taken"
        )
    return backend


def _text(devices: Iterable[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _supports(backend: ModuleType, devices: set[torch.device]) -> bool:
    return all(backend.supports(device) for device in devices)
