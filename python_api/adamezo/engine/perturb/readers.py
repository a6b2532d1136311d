"""Which module of a model reads which weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from adamezo_kernels import Plan
from adamezo_kernels.plan import memory_of

from ..memory import has_memory, overlap, storage_of
from .scratch import Loan, Scratch, Weight

WATCHED_EVERY = 100
"""How many updates there are from one step whose every operation is watched for reads of
unperturbed weights to the next such step."""


class Readers:
    """The weights that each module of a model reads, and the memory where it finds them perturbed.

    The owner of a parameter is taken to read it, for a start. Watched steps find the others, such
    as nn.MultiheadAttention, which reads the weights of its `out_proj`.

    Args:
        model: whose parameters the plans' tensors are.
        plans: the weights of each parameter group.
    """

    def __init__(self, model: nn.Module, plans: Sequence[Plan]) -> None:
        self._plans = plans
        self._structure = _structure(model)
        self._updates_until_due = 0
        self._seen: dict[int, ref[nn.Module]] = {}
        # By the modules' addresses: a reference to a module would keep the model alive.
        self._read: dict[int, list[Weight]] = {}
        self._scratch: dict[torch.device, Scratch] = {}
        self._by_storage: dict[int, list[Weight]] = {}
        # By the copies' storage: for which evaluation they were made, and of which weights.
        self._let_out: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._evaluation = 0
        names: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), name)
        by_memory: dict[object, Weight] = {}
        for segment in (segment for plan in plans for segment in plan):
            tensor = segment.tensor
            if tensor.numel():
                if tensor.device not in self._scratch:
                    self._scratch[tensor.device] = Scratch(tensor.device)
                weight = Weight(names[id(tensor)], segment, self._scratch[tensor.device])
                by_memory[memory_of(tensor)] = weight
                self._by_storage.setdefault(storage_of(tensor), []).append(weight)
        for module in model.modules():
            own: dict[Weight, None] = {}  # a set that keeps its order
            for parameter in module._parameters.values():
                if parameter is None or not has_memory(parameter):
                    continue
                found = by_memory.get(memory_of(parameter))
                if found is not None:
                    own[found] = None
                    if all(parameter is not other for other in found.parameters):
                        found.parameters.append(parameter)
            self._read[id(module)] = list(own)

    def are_of(self, model: nn.Module, plans: Sequence[Plan]) -> bool:
        """Whether modules, their parameters and their memory are still the same."""
        return self._plans is plans and self._structure == _structure(model)

    @property
    def scratch_bytes(self) -> int:
        """The most memory that was in use for perturbed copies, on all devices together."""
        return sum(scratch.peak + scratch.staging.bytes for scratch in self._scratch.values())

    @property
    def due(self) -> bool:
        """Whether every operation of the next step is to be watched."""
        return self._updates_until_due == 0

    def end_of_step(self, watched: bool, modules: Mapping[int, nn.Module]) -> None:
        """A step has ended in an update.

        Args:
            watched: whether every operation of it was watched.
            modules: those in which operations were watched, of other models too, by address.
        """
        self._updates_until_due = WATCHED_EVERY - 1 if watched else self._updates_until_due - 1
        if modules:
            self._seen.update((address, ref(module)) for address, module in modules.items())

    def has_seen(self, module: nn.Module) -> bool:
        """Whether an earlier step has watched a module run."""
        seen = self._seen.get(id(module))
        return seen is not None and seen() is module

    def begin_evaluation(self) -> None:
        self._evaluation += 1
        self._let_out = {k: v for k, v in self._let_out.items() if not v[0].expired()}
        for scratch in self._scratch.values():
            scratch.begin()

    def end_evaluation(self) -> None:
        for scratch in self._scratch.values():
            scratch.end()

    def knows(self, module: nn.Module) -> bool:
        return id(module) in self._read

    def read_by(self, module: nn.Module) -> Sequence[Weight]:
        return self._read.get(id(module), ())

    def learn(self, module: nn.Module, weight: Weight) -> None:
        """A module reads a weight of which this was not known."""
        self._read[id(module)].append(weight)
        if self.has_seen(module):
            warnings.warn(
                f"{weight.name} is read in the forward of a {type(module).__name__}, and was not "
                f"when this was last looked at: up to {WATCHED_EVERY - 1} updates before this "
                "step may have evaluated the loss without perturbing it",
                RuntimeWarning,
                stacklevel=2,
            )

    def take_back(self, scratch: Scratch, loan: Loan, weights: Sequence[Weight]) -> None:
        """A module no longer needs the copies of these weights."""
        if scratch.take_back(loan):
            storage, names = loan.copies.storage, ", ".join([weight.name for weight in weights])
            self._let_out[storage.cdata] = storage, self._evaluation, names

    def outdated(self, tensor: Tensor) -> str | None:
        """The names of the weights whose copies of an earlier evaluation a tensor is over, if any:
        a module has kept a view of a weight."""
        if not self._let_out or not has_memory(tensor):
            return None
        storage, evaluation, names = self._let_out.get(storage_of(tensor), (None, 0, ""))
        there = storage is not None and not storage.expired() and evaluation != self._evaluation
        return names if there else None

    def weight_under(self, tensor: Tensor) -> Weight | None:
        """The weight that shares memory with a tensor, if any."""
        try:
            candidates = self._by_storage.get(storage_of(tensor), ())
        except (NotImplementedError, RuntimeError):  # sparse, and others without one memory
            return None
        return next((w for w in candidates if overlap(tensor, w.unperturbed)), None)


def _structure(model: nn.Module) -> list[tuple[object, ...]]:
    """What decides who reads which weights: modules, their parameters, and whether they train."""
    return [(id(m), m.training, *map(id, m._parameters.values())) for m in model.modules()]
