"""The trained weights of a model: by their modules, and by their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from adamezo_kernels import Plan
from adamezo_kernels.plan import memory_of

from ..memory import has_memory, overlap, storage_of


class Owned(NamedTuple):
    """A parameter of a module that is one of the weights, or has its memory."""

    module: int
    """The module's address: a reference to it would keep the model alive."""
    parameters: dict[str, nn.Parameter | None]
    """All of the module's parameters."""
    name: str
    parameter: nn.Parameter
    weight: int
    """Which weight it is."""


class WeightIndex:
    """The weights of some plans, numbered in their order.

    Args:
        model: whose parameters the plans' tensors are.
        plans: the weights of each parameter group.

    Attributes:
        segments: of each weight.
        names: of each weight, the first one that the model has for it.
        owned: every parameter of a module that is a weight. Tied parameters, and two Parameters
            over the same memory, are one weight.
    """

    def __init__(self, model: nn.Module, plans: Sequence[Plan]) -> None:
        self._plans = plans
        self._structure = _structure(model)
        self.segments = [segment for plan in plans for segment in plan]
        names: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), name)
        self.names = [names[id(segment.tensor)] for segment in self.segments]
        # Of their own: perturbation out of place lets the parameters point elsewhere for a time.
        self._tensors = [segment.tensor.detach() for segment in self.segments]
        number: dict[object, int] = {}
        self._by_storage: dict[int, list[int]] = {}
        for i, segment in enumerate(self.segments):
            if segment.tensor.numel():
                number[memory_of(segment.tensor)] = i
                self._by_storage.setdefault(storage_of(segment.tensor), []).append(i)
        self.owned = [
            Owned(id(module), module._parameters, name, p, number[memory_of(p)])
            for module in model.modules()
            for name, p in module._parameters.items()
            if p is not None and has_memory(p) and memory_of(p) in number
        ]

    def is_of(self, model: nn.Module, plans: Sequence[Plan]) -> bool:
        """Whether modules, their parameters and their memory are still the same."""
        return self._plans is plans and self._structure == _structure(model)

    def under(self, tensor: Tensor) -> int | None:
        """The number of the weight that shares memory with a tensor, if any."""
        try:
            candidates = self._by_storage.get(storage_of(tensor), ())
        except (NotImplementedError, RuntimeError):  # sparse, and others without one memory
            return None
        return next((i for i in candidates if overlap(tensor, self._tensors[i])), None)


def _structure(model: nn.Module) -> list[tuple[object, ...]]:
    """What decides who reads which weights: modules, their parameters, and whether they train."""
    return [(id(m), m.training, *map(id, m._parameters.values())) for m in model.modules()]
