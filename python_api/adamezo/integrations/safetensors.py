"""Weights in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from adamezo_kernels.plan import memory_of

try:
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise ImportError(
        "a .safetensors file needs the safetensors package: pip install 'adamezo[transformers]'"
    ) from error


def load(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, by name."""
    return load_file(path)


def save(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes ``tensors``. Of those that share memory only the first is kept, as is the custom."""
    seen = set()
    kept = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or memory_of(tensor) not in seen:
            seen.add(memory_of(tensor))
            kept[name] = tensor.detach().contiguous()
    save_file(kept, path, metadata={"format": "pt"})
