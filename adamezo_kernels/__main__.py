"""``python -m adamezo_kernels``: what can run here, and for the rest why not and what to do.

``--require cuda triton`` ends with exit status 1 where one of the backends named cannot run.
"""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from . import STREAM_VERSION
from .backends import BACKENDS, choose, native


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
        "distributions      "
        + "; ".join(f"{b.NAME}: {', '.join(b.DISTRIBUTIONS)}" for b in BACKENDS.values()),
        f"taken for cpu      {choose([torch.device('cpu')]).NAME}",
    ]
    if torch.cuda.is_available():
        lines.append(f"taken for cuda     {choose([torch.device('cuda')]).NAME}")
    return "\n".join(lines)


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m adamezo_kernels")
    options.add_argument("--require", nargs="+", default=[], choices=BACKENDS, metavar="BACKEND")
    required = options.parse_args().require
    print(report())
    missing = [name for name in required if not BACKENDS[name].availability()[0]]
    if missing:
        sys.exit(f"required and not able to run here: {', '.join(missing)} (reasons above)")
