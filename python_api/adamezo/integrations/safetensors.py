"""Weights in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from adamezo_kernels.plan import memory_of

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise ImportError(
        "a .safetensors file needs the safetensors package: pip install 'adamezo[transformers]'"
    ) from error


def load(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Raises:
        ValueError: it is damaged, or no such file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a .safetensors file, got one with {error}") from error


def save(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes ``tensors``. Of those that share memory only the first is kept, as is the custom.

    Raises:
        OSError: the file cannot be written.
    """
    seen = set()
    kept = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or memory_of(tensor) not in seen:
            seen.add(memory_of(tensor))
            kept[name] = tensor.detach().contiguous()
    try:
        save_file(kept, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
