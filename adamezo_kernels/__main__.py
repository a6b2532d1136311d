"""``python -m adamezo_kernels``: what can run here, what cannot, why, and what would change it."""

from __future__ import annotations

import platform
import sys

import torch

from . import STREAM_VERSION
from .backends import BACKENDS, choose, native


def _cuda() -> str:
    if not native.availability()[0]:
        return "no compiled module, so no CUDA part of it either"
    report = native.build_report()["cuda"]
    if report.startswith("off"):
        return (
            f"{report}. To build it: install a CUDA toolkit, then "
            "`ADAMEZO_CUDA=ON pip install --force-reinstall --no-deps .`"
        )
    status = native.cuda_report()
    found = f"built by {report}; "
    if status["devices"]:
        return found + f"{status['devices']} device(s) visible"
    if not status["driver_version"]:
        return found + "no NVIDIA driver on this machine"
    return found + f"no device usable: {status['error']}"


def report() -> str:
    """The text that the command prints."""
    lines = [
        f"adamezo_kernels, stream version {STREAM_VERSION}",
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
        "",
    ]
    for name, backend in BACKENDS.items():
        available, reason = backend.availability()
        lines.append(f"{name:<10} {'yes' if available else 'no':<4} {reason}")
    lines += [
        "",
        f"instruction sets   {', '.join(native.instruction_sets()) or 'none (nothing compiled)'}",
        f"threads            {torch.get_num_threads()} (torch.get_num_threads())",
        f"cuda               {_cuda()}",
        f"taken for cpu      {choose([torch.device('cpu')]).NAME}",
    ]
    if torch.cuda.is_available():
        lines.append(f"taken for cuda     {choose([torch.device('cuda')]).NAME}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
    sys.exit(0)
