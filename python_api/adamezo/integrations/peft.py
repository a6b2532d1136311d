"""LoRA adapters by the peft library: put into a model, merged, taken out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise ImportError("LoRA adapters need the peft package: pip install 'adamezo[lora]'") from error


def insert(model: nn.Module, names: Sequence[str], rank: int, seed: int) -> list[Parameter]:
    """Puts float32 LoRA adapters with alpha = 2 rank beside the linear layers of these names.

    Returns:
        The adapters' parameters.
    """
    with torch.random.fork_rng():  # peft draws from the global generators
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(names))
        inject_adapter_in_model(config, model)
    own = [p for layer in _layers(model).values() for p in _own(layer)]
    for p in own:  # which peft makes of the base's type, and computes with in theirs
        p.data = p.data.float()
    return own


def check_plain(model: nn.Module) -> None:
    """Raises ValueError if a model has adapters of peft that are not from here."""
    if hasattr(model, "peft_config") or _layers(model):
        raise ValueError(
            f"this {type(model).__name__} has adapters of peft already: train them as they are, "
            "with the parameters that require gradients, or take them out by peft first"
        )


def products(model: nn.Module) -> dict[str, tuple[Any, Callable[[], Tensor]]]:
    """By name each layer under LoRA, and what computes the change of its weight."""
    return {
        name: (layer.get_base_layer(), partial(layer.get_delta_weight, "default"))
        for name, layer in _layers(model).items()
    }


def remove(model: nn.Module) -> None:
    """Takes all LoRA adapters out."""
    for name, layer in _layers(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def _own(layer: nn.Module) -> list[Parameter]:
    return [p for name, p in layer.named_parameters() if name.startswith("lora_")]
