"""Memory for perturbed copies of weights, which exist while a module runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from adamezo_kernels import Call, Plan, Segment, Terms
from adamezo_kernels.staging import Staging

_ALIGNMENT = 64  # of a copy, in bytes: a cache line, and as much as torch gives its own tensors


class Weight:
    """A trainable weight, and all of a model's parameters that are this memory."""

    def __init__(self, name: str, segment: Segment, scratch: Scratch) -> None:
        self.name = name
        self.index = segment.parameter
        self.scratch = scratch
        self.unperturbed = segment.tensor.detach()
        self.buffers = segment.buffers
        self.bytes = -(-self.unperturbed.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.parameters: list[Tensor] = []
        self.perturbed = False

    def point_to(self, copy: Tensor | None) -> None:
        """Lets the parameters read a perturbed copy, or the weight itself. They keep their
        identity, version and requires_grad; only their memory changes."""
        self.perturbed = copy is not None
        for p in self.parameters:
            p.data = self.unperturbed if copy is None else copy


class Copies:
    """Copies of some weights in one piece of memory, and the plan that fills them.

    They have the order of dimensions in memory that the weights have, by which torch chooses
    kernels: the loss is that of weights which were perturbed in place.
    """

    def __init__(self, weights: Sequence[Weight], memory: UntypedStorage, staging: Staging) -> None:
        self._memory = memory
        self.tensors: list[Tensor] = []
        start = 0
        for weight in weights:
            like = weight.unperturbed
            # Of the same kind as the weight, whose place it takes, whatever the closure's own mode.
            with torch.inference_mode(like.is_inference()):
                copy = torch.empty(0, dtype=like.dtype, device=like.device)
                offset = start // like.element_size()
                strides = torch.empty_like(like, device="meta").stride()
                copy.set_(memory, offset, like.shape, strides)
            self.tensors.append(copy)
            start += weight.bytes
        unperturbed = Plan(
            [weight.unperturbed for weight in weights],
            parameters=[weight.index for weight in weights],
            names=[weight.name for weight in weights],
        )
        whole = unperturbed.with_buffers([weight.buffers for weight in weights])
        self._plan = whole.into(self.tensors, staging=staging)
        self._call: Call | None = None
        self._direction: Terms | None = None
        self._users = _users(memory)

    def filled_by(self, direction: Terms, scale: float, distribution: str) -> Call:
        """The call that writes ``theta + scale z`` into the copies."""
        if self._call is None:
            self._call = Call("perturb", self._plan, direction, distribution, "nearest", scale)
        else:  # like the last one, but for these
            new = None if direction is self._direction else direction
            self._call = self._call.vary(terms=new, scale=scale)
        self._direction = direction
        return self._call

    @property
    def storage(self) -> StorageWeakRef:
        """The memory, without keeping it."""
        return StorageWeakRef(self._memory)

    def held_elsewhere(self) -> bool:
        """Whether somebody holds a tensor over this memory, such as a view."""
        return _users(self._memory) != self._users


class Loan:
    """Copies that a module uses while it runs."""

    def __init__(self, key: tuple[int, ...], start: int, copies: Copies, own: int) -> None:
        self.key = key
        self.start = start
        self.copies = copies
        self.own = own
        """How many bytes are outside of the stack."""


class Scratch:
    """Memory of one device for the copies that exist at one time: a stack, as calls are nested.

    Copies that do not fit get memory of their own, once: at the next evaluation the stack is
    larger. So do the copies of a module that are still in use after its forward, as when it returns
    a view of its weight; whoever has them keeps them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.staging = Staging()  # one for all copies: they are made one after the other
        self.peak = 0
        self._memory: UntypedStorage | None = None
        self._size = 0
        self._top = 0
        self._wanted = 0
        self._own = 0
        self._stream: object = None
        self._copies: dict[tuple[int, tuple[int, ...]], Copies] = {}
        self._let_out: set[tuple[int, ...]] = set()

    def begin(self) -> None:
        """An evaluation begins: the stack grows to what the last one wanted."""
        self._stream = None
        if self._wanted > self._size:
            self._allocate(self._wanted)

    def end(self) -> None:
        """An evaluation has ended."""
        self._top = self._own = 0

    def lend(self, weights: Sequence[Weight]) -> Loan:
        """Copies of some weights, which are still to be filled.

        Raises:
            RuntimeError: this evaluation has used another CUDA stream before.
        """
        self._check_stream(weights[0].name)
        key = tuple([weight.index for weight in weights])
        size = sum([weight.bytes for weight in weights])
        start = self._top
        if key in self._let_out:
            return self._lend_own(key, weights, size, start)
        self._top += size
        self._wanted = max(self._wanted, self._top)
        if start == 0 and size > self._size:
            self._allocate(size)
        if self._memory is None or self._top > self._size:
            return self._lend_own(key, weights, size, start)
        copies = self._copies.get((start, key))
        if copies is None:
            copies = Copies(weights, self._memory[start : start + size], self.staging)
            self._copies[start, key] = copies
        return Loan(key, start, copies, 0)

    def take_back(self, loan: Loan) -> bool:
        """Returns whether somebody still holds the copies, whose they are from then on."""
        self._own -= loan.own
        self._top = loan.start
        held = loan.copies.held_elsewhere()
        if held:
            self._let_out.add(loan.key)
            if not loan.own:
                self._forget()
        return held

    def _lend_own(
        self, key: tuple[int, ...], weights: Sequence[Weight], size: int, start: int
    ) -> Loan:
        self._own += size
        self.peak = max(self.peak, self._size + self._own)
        memory = torch.empty(size, dtype=torch.uint8, device=self.device).untyped_storage()
        return Loan(key, start, Copies(weights, memory, self.staging), size)

    def _allocate(self, size: int) -> None:
        self._forget()  # before, so that both are never there at once
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._memory, self._size = memory.untyped_storage(), size
        self.peak = max(self.peak, self._size + self._own)

    def _forget(self) -> None:
        self._copies.clear()
        self._memory, self._size = None, 0

    def _check_stream(self, name: str) -> None:
        """On another stream, the next module would overwrite what this one still reads."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            if self._stream is not None and self._stream != stream:
                raise RuntimeError(
                    f"{name} is read on a CUDA stream other than that of the modules before: "
                    "perturbation='out_of_place' needs one stream an evaluation. Take "
                    "perturbation='inplace'"
                )
            self._stream = stream


def _users(storage: UntypedStorage) -> int:
    """How many tensors and other objects hold a storage."""
    return torch._C._storage_Use_Count(storage._cdata)
