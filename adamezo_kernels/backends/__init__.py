"""What can run the operations, and which of them does.

A backend is a module with ``availability() -> (bool, reason)``, ``supports(device) -> bool``,
``DISTRIBUTIONS`` and ``run``, which does one operation on arguments that
:mod:`adamezo_kernels.ops` has checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import ModuleType

import torch

from . import cuda, native, reference, triton

Backend = ModuleType

BACKENDS: dict[str, ModuleType] = {
    "native": native,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}
"""By name, the preferred first."""


def choose(
    devices: Iterable[torch.device], name: str | None = None, distribution: str = "exact"
) -> ModuleType:
    """The backend for tensors on ``devices`` and this kind of directions.

    A backend that was named, in the call or by ``ADAMEZO_BACKEND``, is taken or refused, never
    replaced. Otherwise it is the first of BACKENDS that is available and supports both.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend is not available here, or does not support a device or the
            distribution; or none does; or the devices are of more than one type.
    """
    if isinstance(name, ModuleType):
        return name
    devices = set(devices)
    found = _text(devices)
    name = name or os.environ.get("ADAMEZO_BACKEND") or None
    if name is None:
        if len({device.type for device in devices}) > 1:
            raise RuntimeError(
                f"the tensors are on {found}, expected devices of one type: make a Plan for the "
                "tensors of each type, or move the odd ones"
            )
        reasons = []
        for backend in BACKENDS.values():
            if not _supports(backend, devices):
                continue
            available, reason = backend.availability()
            if available and distribution in backend.DISTRIBUTIONS:
                return backend
            takes = f"{backend.NAME} has {', '.join(backend.DISTRIBUTIONS)}"
            reasons.append(takes if available else f"{takes}, and cannot run: {reason}")
        if not reasons:
            raise RuntimeError(
                f"no backend supports tensors on {found}: move them to a CPU or a CUDA device"
            )
        raise RuntimeError(
            f"no backend does distribution {distribution!r} for tensors on {found}: "
            + "; ".join(reasons)
        )
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    available, reason = backend.availability()
    if not available:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if not _supports(backend, devices):
        raise RuntimeError(
            f"backend {name!r} does not support tensors on {found}; name none, "
            "and the best one that does is taken"
        )
    if distribution not in backend.DISTRIBUTIONS:
        raise RuntimeError(
            f"backend {name!r} has no distribution {distribution!r}, expected one of "
            f"{', '.join(backend.DISTRIBUTIONS)}"
        )
    return backend


def _text(devices: Iterable[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _supports(backend: ModuleType, devices: set[torch.device]) -> bool:
    return all(backend.supports(device) for device in devices)
