"""The kinds of adapters: how each is put into a model, merged and taken out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .targets import Family, Targets, family_of, find, sides_of
from .tensor_train import TensorTrainAdapter, TensorTrainLinear


class Scheme:
    """A kind of adapters. Models are left as they were by whatever raises."""

    name: str
    defaults: Mapping[str, Any]
    """Its options."""
    several: tuple[str, ...] = ()
    """Those that may be a sequence of numbers."""

    def places(self, model: nn.Module, targets: Targets | None) -> dict[str, str]:
        """The modules that get an adapter, with its side of them."""
        if isinstance(targets, Mapping):
            raise ValueError(
                f"targets: got sides ({targets}), but {self.name!r} goes beside a layer: pass "
                "patterns of module names"
            )
        patterns = self._published(family_of(model)) if targets is None else targets
        return find(model, sides_of(patterns))

    def _published(self, family: Family) -> Targets:
        return family.beside

    def insert(
        self, model: nn.Module, places: Mapping[str, str], options: Mapping[str, Any], seed: int
    ) -> list[Parameter]:
        """Puts adapters into a model, and returns their parameters."""
        raise NotImplementedError

    def remove(self, model: nn.Module, places: Mapping[str, str]) -> None:
        """Takes them out."""
        raise NotImplementedError

    def merge(self, model: nn.Module, places: Mapping[str, str]) -> None:
        """Adds them to the weights, and takes them out."""
        raise ValueError(
            f"adapters of the scheme {self.name!r} cannot be merged: no weight of the base can do "
            "what they do. Keep them in the model, or save them with save_adapters"
        )


# The hooks are functions of this module, so that a model with adapters can be copied and pickled.


def _on_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return module.tensor_train(_input(module, args)), *args[1:]


def _on_output(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.tensor_train(output)


def _beside(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.tensor_train(_input(module, args))


def _input(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    if not args:
        raise TypeError(
            f"a {type(module).__name__} with an adapter was called without a positional argument, "
            "expected its input as the first one"
        )
    return args[0]


class TensorTrains(Scheme):
    """Tensor trains attached to linear layers, as their submodule ``tensor_train``."""

    several = ("rank",)

    def _adapter(
        self, module: Any, side: str, options: Mapping[str, Any], generator: torch.Generator
    ) -> nn.Module:
        raise NotImplementedError

    def _attach(self, module: nn.Module, side: str) -> Any:
        """Makes the layer call its adapter, and returns a handle with ``remove``."""
        raise NotImplementedError

    def insert(
        self, model: nn.Module, places: Mapping[str, str], options: Mapping[str, Any], seed: int
    ) -> list[Parameter]:
        generator = torch.Generator().manual_seed(seed)
        modules = {name: model.get_submodule(name) for name in places}
        taken = [name for name, module in modules.items() if hasattr(module, "tensor_train")]
        if taken:
            raise ValueError(
                f"{taken[0]} has a tensor train already: take it out with remove(...) of the model "
                "that adapt was given"
            )
        adapters = {
            name: self._adapter(module, places[name], options, generator)
            for name, module in modules.items()
        }
        for name, adapter in adapters.items():
            tensors = chain(modules[name].parameters(), modules[name].buffers())
            modules[name].tensor_train = adapter.to(next(tensors).device)
            modules[name].tensor_train_hook = self._attach(modules[name], places[name])
        return [p for adapter in adapters.values() for p in adapter.parameters()]

    def remove(self, model: nn.Module, places: Mapping[str, str]) -> None:
        for name in places:
            module: Any = model.get_submodule(name)
            module.tensor_train_hook.remove()
            del module.tensor_train_hook, module.tensor_train


class ResidualTensorTrains(TensorTrains):
    """AdaZeta's adapters, on the input or the output of linear layers."""

    name = "tensor-train"
    defaults = dict(rank=5, bottleneck=64, activation="relu", bias=True, init="zero")

    def places(self, model: nn.Module, targets: Targets | None) -> dict[str, str]:
        chosen = self._published(family_of(model)) if targets is None else targets
        return find(model, sides_of(chosen))

    def _published(self, family: Family) -> Targets:
        return family.residual

    def _adapter(
        self, module: Any, side: str, options: Mapping[str, Any], generator: torch.Generator
    ) -> nn.Module:
        width = module.in_features if side == "input" else module.out_features
        return TensorTrainAdapter(width, generator=generator, **options)

    def _attach(self, module: nn.Module, side: str) -> Any:
        if side == "input":
            return module.register_forward_pre_hook(_on_input)
        return module.register_forward_hook(_on_output)


class TensorTrainsBeside(TensorTrains):
    """A tensor train beside each linear layer, whose output is added: it can be merged."""

    name = "tensor-train-linear"
    defaults = dict(rank=5, bias=False, init="zero")

    def _adapter(
        self, module: Any, side: str, options: Mapping[str, Any], generator: torch.Generator
    ) -> nn.Module:
        sizes = module.in_features, module.out_features
        return TensorTrainLinear(*sizes, generator=generator, **options)

    def _attach(self, module: nn.Module, side: str) -> Any:
        return module.register_forward_hook(_beside)

    def merge(self, model: nn.Module, places: Mapping[str, str]) -> None:
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in places}
        for name, layer in layers.items():
            if layer.tensor_train.bias is None:
                continue
            if layer.bias is None:
                raise ValueError(
                    f"{name} cannot take its adapter, which has a bias, and the layer has none: "
                    "adapt with bias=False"
                )
            _check_finite(name, layer.bias, layer.tensor_train.bias)
        _add(model, {n: (layer, layer.tensor_train.dense) for n, layer in layers.items()})
        with torch.no_grad():
            for layer in layers.values():
                if layer.tensor_train.bias is not None:
                    layer.bias.copy_(_sum(layer.bias, layer.tensor_train.bias))
        self.remove(model, places)


@torch.no_grad()
def _add(model: nn.Module, changes: Mapping[str, tuple[Any, Callable[[], Tensor]]]) -> None:
    """Adds to the weights of linear layers, rounded once, after a look at all of them.

    Args:
        model: with the layers, whose weights no other module may have.
        changes: by the layer's name, the layer and what computes the change of its weight.
    """
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, (layer, change) in changes.items():
        shape, weight = (layer.out_features, layer.in_features), getattr(layer, "weight", None)
        if weight is None or weight.shape != shape or not _is_plain(weight):
            raise ValueError(
                f"{name} cannot take its adapter: its weight is {_described(weight)}, expected a "
                f"floating-point one of shape {shape}. A quantised one would be quantised again, "
                "which rounds adapters away: keep them beside it"
            )
        if shared[id(weight)] > 1:
            raise ValueError(
                f"{name} cannot take its adapter: another module has the same weight, such as "
                "tied embeddings, and would be changed too. Keep the adapters in the model"
            )
        _check_finite(name, weight, change())
    for layer, change in changes.values():
        layer.weight.copy_(_sum(layer.weight, change()))


def _check_finite(name: str, weight: Tensor, change: Tensor) -> None:
    if not torch.isfinite(_sum(weight, change)).all():
        raise ValueError(
            f"{name} cannot take its adapter: the sum is not finite in {weight.dtype}. Is the "
            "adapter? A run that diverged, or a 16-bit type that overflows, would be merged"
        )


def _sum(weight: Tensor, change: Tensor) -> Tensor:
    return (weight.double() + change.double()).to(weight.dtype)


class LoRA(Scheme):
    """LoRA by the peft library, with alpha = 2 rank."""

    name = "lora"
    defaults = dict(rank=8)

    def insert(
        self, model: nn.Module, places: Mapping[str, str], options: Mapping[str, Any], seed: int
    ) -> list[Parameter]:
        from ..integrations import peft

        peft.check_plain(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        try:
            return peft.insert(model, list(places), options["rank"], seed)
        except BaseException:
            peft.remove(model)
            for p in trained:
                p.requires_grad_(True)
            raise

    def remove(self, model: nn.Module, places: Mapping[str, str]) -> None:
        from ..integrations import peft

        peft.remove(model)

    def merge(self, model: nn.Module, places: Mapping[str, str]) -> None:
        from ..integrations import peft

        _add(model, peft.products(model))
        peft.remove(model)


class Prefixes(Scheme):
    """Trained keys and values in front of every text."""

    name = "prefix"
    defaults = dict(length=5)

    def places(self, model: nn.Module, targets: Targets | None) -> dict[str, str]:
        if targets is not None:
            raise ValueError(f"targets: got {targets!r}, but a prefix is of the whole model")
        return {}

    def insert(
        self, model: Any, places: Mapping[str, str], options: Mapping[str, Any], seed: int
    ) -> list[Parameter]:
        from ..integrations import prefix

        made = prefix.make(model, options["length"], seed)
        model.prefix_hooks = prefix.attach(model, made)
        return list(made.parameters())

    def remove(self, model: Any, places: Mapping[str, str]) -> None:
        for hook in model.prefix_hooks:
            hook.remove()
        del model.prefix_hooks, model.prefix


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight's elements are its numbers. Quantised ones are packed, or of a class of
    tensors that stands for other numbers than it holds."""
    return type(weight) in (Tensor, Parameter) and weight.dtype.itemsize >= 2


def _described(weight: Tensor | None) -> str:
    if weight is None:
        return "none"
    kind = "" if type(weight) in (Tensor, Parameter) else f" ({type(weight).__name__})"
    return f"{weight.dtype}{kind} of shape {tuple(weight.shape)}"


_ALL = (ResidualTensorTrains(), TensorTrainsBeside(), LoRA(), Prefixes())
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}
