"""Which module of a model reads which weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from adamezo_kernels import Plan

from ..memory import has_memory, storage_of
from .index import WeightIndex
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
        self._index = index = WeightIndex(model, plans)
        self._updates_until_due = 0
        self._seen: dict[int, ref[nn.Module]] = {}
        self._scratch: dict[torch.device, Scratch] = {}
        # By the copies' storage: for which evaluation they were made, and of which weights.
        self._let_out: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._evaluation = 0
        self._weights: list[Weight] = []
        for name, segment in zip(index.names, index.segments, strict=True):
            device = segment.tensor.device
            if device not in self._scratch:
                self._scratch[device] = Scratch(device)
            self._weights.append(Weight(name, segment, self._scratch[device]))
        # By the modules' addresses: a reference to a module would keep the model alive.
        self._read: dict[int, list[Weight]] = {id(module): [] for module in model.modules()}
        for owned in index.owned:
            weight, own = self._weights[owned.weight], self._read[owned.module]
            if weight not in own:
                own.append(weight)
            if all(owned.parameter is not other for other in weight.parameters):
                weight.parameters.append(owned.parameter)

    def are_of(self, model: nn.Module, plans: Sequence[Plan]) -> bool:
        """Whether modules, their parameters and their memory are still the same."""
        return self._index.is_of(model, plans)

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
        i = self._index.under(tensor)
        return None if i is None else self._weights[i]
