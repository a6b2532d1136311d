"""The kinds of adapters: how each is put into a model, merged and taken out."""

from __future__ import annotations

from collections.abc import Mapping
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

    @torch.no_grad()
    def merge(self, model: nn.Module, places: Mapping[str, str]) -> None:
        modules: dict[str, Any] = {name: model.get_submodule(name) for name in places}
        for name, module in modules.items():
            self._check_can_merge(name, module)
        for module in modules.values():
            train = module.tensor_train
            module.weight.copy_(module.weight.double() + train.dense().double())
            if train.bias is not None:
                module.bias.copy_(module.bias.double() + train.bias.double())
        self.remove(model, places)

    def _check_can_merge(self, name: str, module: Any) -> None:
        shape = module.out_features, module.in_features
        weight = getattr(module, "weight", None)
        if weight is None or weight.shape != shape or not _is_plain(weight):
            raise ValueError(
                f"{name} cannot take its tensor train: its weight is {_described(weight)}, "
                f"expected a floating-point one of shape {shape}"
            )
        if module.tensor_train.bias is not None and module.bias is None:
            raise ValueError(
                f"{name} cannot take its tensor train, which has a bias, and the layer has none: "
                "adapt with bias=False"
            )


class LoRA(Scheme):
    """LoRA by the peft library, with alpha = 2 rank."""

    name = "lora"
    defaults = dict(rank=8)

    def insert(
        self, model: nn.Module, places: Mapping[str, str], options: Mapping[str, Any], seed: int
    ) -> list[Parameter]:
        from ..integrations import peft

        trained = [p for p in model.parameters() if p.requires_grad]
        try:
            return peft.insert(model, list(places), options["rank"], seed)
        except BaseException:
            peft.remove(model, merge=False)
            for p in trained:
                p.requires_grad_(True)
            raise

    def remove(self, model: nn.Module, places: Mapping[str, str]) -> None:
        from ..integrations import peft

        peft.remove(model, merge=False)

    def merge(self, model: nn.Module, places: Mapping[str, str]) -> None:
        from ..integrations import peft

        for name in places:
            layer: Any = model.get_submodule(name)
            weight = layer.get_base_layer().weight
            if not _is_plain(weight):
                raise ValueError(
                    f"{name} cannot take its LoRA adapter: its weight is {_described(weight)}, and "
                    "the sum would be quantised again, which rounds adapters away. Keep them "
                    "beside it, or merge into a base of full precision"
                )
        peft.remove(model, merge=True)


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
