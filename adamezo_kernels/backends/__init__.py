"""The backends that run operations, and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

import torch

from ..call import Call
from ..stream import kind_of
from . import cuda, native, reference, triton


class Backend(Protocol):
    """The interface of a backend, which is a module."""

    NAME: str
    DISTRIBUTIONS: tuple[str, ...]

    def availability(self) -> tuple[bool, str]:
        """Whether it can run in this process, and one line on why (not)."""

    def supports(self, device: torch.device) -> bool:
        """Whether it runs on tensors of that device."""

    def run(self, call: Call) -> None:
        """Runs the call on the plan's launches, whose devices it supports."""


BACKENDS: dict[str, Backend] = {
    "native": native,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}
"""All backends by name, the preferred first."""


def choose(
    devices: Iterable[torch.device],
    name: str | Backend | None = None,
    distribution: str = "exact",
) -> Backend:
    """The backend for tensors on ``devices`` and directions of this distribution.

    A backend that was named, in the call or by ``ADAMEZO_BACKEND``, is taken or refused, never
    replaced. Otherwise it is the first of BACKENDS that is available and supports both. The
    availability of a backend passed as a module is not checked again.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend is not available here, or does not support a device or the
            distribution; or none does; or the devices are of more than one type.
    """
    name = name or os.environ.get("ADAMEZO_BACKEND") or None
    if name is None:
        return _best(frozenset(devices), distribution)
    devices = tuple(devices)
    if isinstance(name, str):
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
        backend = BACKENDS[name]
        available, reason = backend.availability()
        if not available:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
    else:
        backend = name
    if not _supports(backend, devices):
        raise RuntimeError(
            f"backend {backend.NAME!r} does not support tensors on {_text(devices)}; pass no "
            "name to use the best backend that does"
        )
    if kind_of(distribution)[0] not in backend.DISTRIBUTIONS:
        raise RuntimeError(
            f"backend {backend.NAME!r} has no distribution {distribution!r}, expected one of "
            f"{', '.join(backend.DISTRIBUTIONS)}"
        )
    return backend


def _best(devices: frozenset[torch.device], distribution: str) -> Backend:
    found = _text(devices)
    if len({device.type for device in devices}) > 1:
        raise RuntimeError(
            f"the tensors are on {found}, expected devices of one type: make a Plan for the "
            "tensors of each type, or move the odd ones"
        )
    reasons, (kind, _) = [], kind_of(distribution)
    for backend in BACKENDS.values():
        if not _supports(backend, devices):
            continue
        available, reason = backend.availability()
        if available and kind in backend.DISTRIBUTIONS:
            return backend
        takes = f"{backend.NAME} has {', '.join(backend.DISTRIBUTIONS)}"
        reasons.append(takes if available else f"{takes}, and cannot run: {reason}")
    if not reasons:
        raise RuntimeError(
            f"no backend supports tensors on {found}: move them to a CPU or a CUDA device"
        )
    raise RuntimeError(
        f"no backend has distribution {distribution!r} for tensors on {found}: "
        + "; ".join(reasons)
    )


def _text(devices: Iterable[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _supports(backend: Backend, devices: Iterable[torch.device]) -> bool:
    return all([backend.supports(device) for device in devices])
