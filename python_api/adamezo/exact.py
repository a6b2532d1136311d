"""Exact perturbation: modules read displaced copies of their weights, which are never written."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from weakref import ref

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves

from adamezo_kernels import Direction, Plan, Segment, Terms, perturb_
from adamezo_kernels.plan import memory_of
from adamezo_kernels.staging import Staging

from .perturbation import forget_casts

WATCHED_EVERY = 100
"""How many updates there are from one step whose every operation is watched for reads of weights
that are not displaced to the next such step."""

_ALIGNMENT = 64  # of a copy, in bytes: a cache line, and as much as torch gives its own tensors


class Exact:
    """While a module runs, it reads ``theta + to z`` from memory of its own; theta stays as it is.

    Args:
        readers: of the model.
        distribution, backend: see :func:`adamezo_kernels.perturb_`.
    """

    displacements = 0
    broken = False

    def __init__(self, readers: Readers, distribution: str, backend: str) -> None:
        self._readers = readers
        self._distribution = distribution
        self._backend = backend
        self._watched = readers.due
        self._thread = threading.get_ident()
        self._frames: list[_Frame] = []
        self._at_work = False
        self._watch = _Watch(self.look)
        self._watching = False
        self._looked_at: dict[int, nn.Module] = {}
        self._refusal: RuntimeError | None = None

    # --- Displacement ---------------------------------------------------------------------------

    def displace(self, direction: Direction, to: float) -> None:
        # In the form of the kernels, once and not for each module.
        self._direction = direction if isinstance(direction, Terms) else Terms.of([direction])
        self._to = to
        forget_casts()

    def in_weights(self, group: int) -> float:
        return 0.0

    def updated(self, group: int) -> None:
        # Not before: evaluations that were cut short, or whose losses were not finite, may have
        # left out what others read.
        if group == 0:
            self._readers.end_of_step(self._watched, self._looked_at)

    def restore(self) -> None:
        forget_casts()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._unwind)
            self._readers.begin_evaluation()
            if "torch._dynamo" in sys.modules:
                # Compiled code may have been made without the hooks. Whether it is then made anew
                # differs between versions of torch.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Of all modules: hooks of one module would show in it, and torch's own modules choose
            # other kernels where they see some.
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            stack.callback(self._stop_watching)
            self._watch_or_not()
            yield
        if self._refusal is not None:  # even if the closure has caught it
            raise self._refusal

    # --- what modules read ----------------------------------------------------------------------

    def _enter(self, module: nn.Module, arguments: object) -> None:
        weights = self._readers.read_by(module)
        if threading.get_ident() != self._thread:
            if weights:
                raise RuntimeError(
                    f"{weights[0].name} is read in a thread other than the step's: "
                    f"perturbation='exact' displaces weights for one thread only. {_OTHERWISE}"
                )
            return
        frame = _Frame(module)
        around = self._frames[-1].watched if self._frames else False
        frame.watched = around or self._watched or not self._readers.has_seen(module)
        self._frames.append(frame)
        if frame.watched:
            self._looked_at[id(module)] = module
        if weights:
            self._displace(frame, weights)
        self._watch_or_not()

    def _leave(self, module: nn.Module, arguments: object, result: object) -> None:
        frames = self._frames
        if threading.get_ident() == self._thread and any(f.module is module for f in frames):
            found = False
            while not found:  # modules that were left without a word lie above
                found = frames[-1].module is module
                self._release(frames[-1])  # popped after: a signal may cut this short
                frames.pop()
            self._watch_or_not()

    def _unwind(self) -> None:
        while self._frames:
            self._release(self._frames[-1])
            self._frames.pop()
        self._readers.end_evaluation()

    def _displace(self, frame: _Frame, weights: Sequence[_Weight]) -> None:
        """Of these, those that no module around this one has displaced already."""
        still: dict[_Scratch, list[_Weight]] = {}
        for weight in weights:
            if not weight.displaced:
                still.setdefault(weight.scratch, []).append(weight)
        self._at_work = True
        try:
            for scratch, some in still.items():
                taken = scratch.take(some)
                frame.taken.append((scratch, taken))
                perturb_(
                    taken.copies.plan,
                    self._direction,
                    self._to,
                    distribution=self._distribution,
                    backend=self._backend,
                )
                for weight, copy in zip(some, taken.copies.tensors, strict=True):
                    frame.weights.append(weight)
                    weight.point_to(copy)
        finally:
            self._at_work = False

    def _release(self, frame: _Frame) -> None:
        self._at_work = True
        try:
            for weight in frame.weights:
                weight.point_to(None)
            for scratch, taken in frame.taken:
                scratch.give_back(taken)
        finally:
            self._at_work = False

    # --- what modules should not read -----------------------------------------------------------

    def _watch_or_not(self) -> None:
        """Operations are watched outside of all modules, and in modules that no step has seen
        running, at every step; in all others at the steps that are due. Watching costs
        microseconds an operation, and few operations are outside of modules."""
        wanted = self._frames[-1].watched if self._frames else True
        if wanted and not self._watching:
            self._watching = True
            self._watch.__enter__()
        elif self._watching and not wanted and _get_current_dispatch_mode() is self._watch:
            self._stop_watching()  # not if the closure has entered a mode of its own since

    def _stop_watching(self) -> None:
        while _get_current_dispatch_mode() is self._watch:
            self._watch.__exit__(None, None, None)
        self._watching = False

    def look(self, operation: Any, arguments: object) -> None:
        """At an operation before it runs. What it would read undisplaced is displaced now, for the
        module that is running, and from then on for as long as that module runs."""
        if self._at_work:
            return
        for tensor in tree_leaves(arguments):
            weight = self._readers.weight_under(tensor) if isinstance(tensor, Tensor) else None
            if weight is not None and not weight.displaced:
                self._found(weight, tensor)
            elif weight is not None:
                self._refuse(_alias(weight.name))
        for tensor in _written(operation, arguments):
            for frame in self._frames:
                for weight in frame.weights:
                    if _overlap(tensor, weight.parameters[0]):
                        self._refuse(
                            f"{weight.name} is written in a forward, by {operation}: with "
                            "perturbation='exact' that would be lost. Do it outside of the step"
                        )

    def _found(self, weight: _Weight, tensor: Tensor) -> None:
        if all(tensor is not p for p in weight.parameters):
            self._refuse(_alias(weight.name))
        frame = self._frames[-1] if self._frames else None
        if frame is None or not self._readers.knows(frame.module):
            where = "outside of all modules" if frame is None else type(frame.module).__name__
            self._refuse(
                f"{weight.name} is read {'' if frame is None else 'in the forward of a '}{where}"
                f"{'' if frame is None else ', which is no module of the model'}: "
                f"perturbation='exact' displaces weights while a module of the model runs. Read it "
                f"in the forward of one, or {_OTHERWISE[0].lower()}{_OTHERWISE[1:]}"
            )
        self._displace(frame, [weight])
        self._readers.learn(frame.module, weight)

    def _refuse(self, message: str) -> NoReturn:
        self._refusal = RuntimeError(message)
        raise self._refusal


_OTHERWISE = "Take perturbation='inplace'"


def _alias(name: str) -> str:
    return (
        f"{name} is read through another tensor over its memory, such as a view, a detach() or a "
        "copy of the parameters for functional_call that was made outside of the forward: "
        "perturbation='exact' displaces the parameter itself. Use the parameter, or "
        "take perturbation='inplace'"
    )


class _Frame:
    """A module that is running, and what is displaced for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.watched = False
        self.weights: list[_Weight] = []
        self.taken: list[tuple[_Scratch, _Taken]] = []


class _Watch(TorchDispatchMode):
    """Shows every operation to a function, those inside of torch's own too, and runs it."""

    supports_higher_order_operators = True

    def __init__(self, look: Callable[[Any, object], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._look(func, (args, kwargs))
        return func(*args, **kwargs)


class _Weight:
    """A trainable weight, and all of a model's parameters that are this memory."""

    def __init__(self, name: str, segment: Segment, scratch: _Scratch) -> None:
        self.name = name
        self.index = segment.parameter
        self.scratch = scratch
        self.clean = segment.tensor.detach()
        self.buffers = segment.buffers
        self.bytes = -(-self.clean.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.parameters: list[Tensor] = []
        self.displaced = False

    def point_to(self, copy: Tensor | None) -> None:
        """Parameters keep their identity, version and requires_grad; only their memory changes."""
        self.displaced = copy is not None
        for p in self.parameters:
            p.data = self.clean if copy is None else copy


class Readers:
    """Which module of a model reads which weights, and the memory where it finds them displaced.

    Whoever owns a parameter is taken to read it, for a start. Watched steps find the others, such
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
        # By their addresses: a reference to a module would keep the model alive that this goes with
        self._read: dict[int, list[_Weight]] = {}
        self._scratch: dict[torch.device, _Scratch] = {}
        self._under: dict[int, list[_Weight]] = {}
        names: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), name)
        by_memory: dict[object, _Weight] = {}
        for segment in (segment for plan in plans for segment in plan):
            tensor = segment.tensor
            if tensor.numel():
                if tensor.device not in self._scratch:
                    self._scratch[tensor.device] = _Scratch(tensor.device)
                scratch = self._scratch[tensor.device]
                weight = _Weight(names[id(tensor)], segment, scratch)
                by_memory[memory_of(tensor)] = weight
                self._under.setdefault(_storage(tensor), []).append(weight)
        for module in model.modules():
            own: dict[_Weight, None] = {}  # a set that keeps its order
            for parameter in module._parameters.values():
                if parameter is None or not _has_memory(parameter):
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
        """The most memory that was in use for displaced copies, on all devices together."""
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
        self._seen.update((address, ref(module)) for address, module in modules.items())

    def has_seen(self, module: nn.Module) -> bool:
        """Whether an earlier step has watched it run."""
        seen = self._seen.get(id(module))
        return seen is not None and seen() is module

    def begin_evaluation(self) -> None:
        for scratch in self._scratch.values():
            scratch.begin()

    def end_evaluation(self) -> None:
        for scratch in self._scratch.values():
            scratch.end()

    def knows(self, module: nn.Module) -> bool:
        return id(module) in self._read

    def read_by(self, module: nn.Module) -> Sequence[_Weight]:
        return self._read.get(id(module), ())

    def learn(self, module: nn.Module, weight: _Weight) -> None:
        self._read[id(module)].append(weight)
        if self.has_seen(module):
            warnings.warn(
                f"{weight.name} is read in the forward of a {type(module).__name__}, and was not "
                f"when this was last looked at: up to {WATCHED_EVERY - 1} updates before this "
                "step may have evaluated the loss without displacing it",
                RuntimeWarning,
                stacklevel=2,
            )

    def weight_under(self, tensor: Tensor) -> _Weight | None:
        """The weight that shares memory with ``tensor``, if any."""
        try:
            candidates = self._under.get(_storage(tensor), ())
        except (NotImplementedError, RuntimeError):  # sparse, and others without one memory
            return None
        return next((w for w in candidates if _overlap(tensor, w.clean)), None)


class _Copies:
    """Tensors in one piece of memory, and the plan that fills them.

    They have the order of dimensions in memory that the weights have, by which torch chooses
    kernels: the loss is that of weights which were displaced in place.
    """

    def __init__(
        self, weights: Sequence[_Weight], memory: UntypedStorage, staging: Staging
    ) -> None:
        self.memory = memory
        self.tensors: list[Tensor] = []
        start = 0
        for weight in weights:
            like = weight.clean
            # Of the same kind as the weight, whose place it takes, whatever the closure's own mode.
            with torch.inference_mode(like.is_inference()):
                copy = torch.empty(0, dtype=like.dtype, device=like.device)
                offset = start // like.element_size()
                strides = torch.empty_like(like, device="meta").stride()
                copy.set_(memory, offset, like.shape, strides)
            self.tensors.append(copy)
            start += weight.bytes
        clean = Plan(
            [weight.clean for weight in weights],
            parameters=[weight.index for weight in weights],
            names=[weight.name for weight in weights],
        )
        whole = clean.with_buffers([weight.buffers for weight in weights])
        self.plan = whole.into(self.tensors, staging=staging)
        self._users = _users(memory)

    def held_elsewhere(self) -> bool:
        """Whether a tensor over this memory, such as a view, is in someone's hands."""
        return _users(self.memory) != self._users


class _Taken:
    def __init__(self, key: tuple[int, ...], start: int, copies: _Copies, own: int) -> None:
        self.key = key
        self.start = start
        self.copies = copies
        self.own = own
        """Bytes of memory outside of the stack."""


class _Scratch:
    """Memory of one device for the copies that are alive at one time: a stack, as calls are nested.

    What does not fit gets memory of its own, once: at the next evaluation the stack is larger. So
    does a module whose copies are still in use after its forward, as when it returns a view of its
    weight; they are left to whoever has them.
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
        self._copies: dict[tuple[int, tuple[int, ...]], _Copies] = {}
        self._let_out: set[tuple[int, ...]] = set()

    def begin(self) -> None:
        self._stream = None
        if self._wanted > self._size:
            self._make(self._wanted)

    def end(self) -> None:
        self._top = self._own = 0

    def take(self, weights: Sequence[_Weight]) -> _Taken:
        self._check_stream(weights[0].name)
        key = tuple(weight.index for weight in weights)
        size = sum(weight.bytes for weight in weights)
        start = self._top
        if key in self._let_out:
            return self._take_own(key, weights, size)
        self._top += size
        self._wanted = max(self._wanted, self._top)
        if start == 0 and size > self._size:
            self._make(size)
        if self._memory is None or self._top > self._size:
            return self._take_own(key, weights, size, start)
        copies = self._copies.get((start, key))
        if copies is None:
            copies = _Copies(weights, self._memory[start : start + size], self.staging)
            self._copies[start, key] = copies
        return _Taken(key, start, copies, 0)

    def give_back(self, taken: _Taken) -> None:
        self._own -= taken.own
        self._top = taken.start
        if taken.copies.held_elsewhere():
            self._let_out.add(taken.key)
            if not taken.own:
                self._forget()

    def _take_own(
        self, key: tuple[int, ...], weights: Sequence[_Weight], size: int, start: int | None = None
    ) -> _Taken:
        self._own += size
        self.peak = max(self.peak, self._size + self._own)
        memory = torch.empty(size, dtype=torch.uint8, device=self.device).untyped_storage()
        copies = _Copies(weights, memory, self.staging)
        return _Taken(key, self._top if start is None else start, copies, size)

    def _make(self, size: int) -> None:
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
                    f"perturbation='exact' needs one stream an evaluation. {_OTHERWISE}"
                )
            self._stream = stream


def _structure(model: nn.Module) -> list[tuple[object, ...]]:
    """What decides who reads what: modules, their parameters, and whether they train."""
    return [(id(m), m.training, *map(id, m._parameters.values())) for m in model.modules()]


def _has_memory(p: Tensor) -> bool:
    return p.layout == torch.strided and not is_traceable_wrapper_subclass(p) and not p.is_nested


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _users(storage: UntypedStorage) -> int:
    """How many tensors and other objects hold it."""
    return torch._C._storage_Use_Count(storage._cdata)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte in the storage, and the one behind the last."""
    begin = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((int(size) - 1) * int(step) for size, step in steps)
    return begin, begin + (last + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    (begin, end), (first, last) = _extent(a), _extent(b)
    return _storage(a) == _storage(b) and begin < last and first < end


def _written(operation: Any, arguments: Any) -> list[Tensor]:
    """The tensors that an operation writes to."""
    schema = getattr(operation, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    args, kwargs = arguments
    written = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return written
