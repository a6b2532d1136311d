"""Buffers of a model's modules, such as BatchNorm's running statistics, which evaluations write.

Not to be confused with what a rule keeps for each weight: these are torch's ``model.buffers()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adamezo_kernels import Plan
from adamezo_kernels.plan import memory_of

from .exact import _extent, _has_memory, _storage

MODULE_BUFFERS = ("every", "last")
"""Which evaluations of a step may move them."""

_Memory = tuple[object, ...]


class _Kept(NamedTuple):
    buffer: Tensor
    data: Tensor
    """Keeps memory that the buffer may let go of."""
    memory: _Memory | None
    version: int | None
    copy: Tensor

    def put_back(self) -> None:
        buffer = self.buffer
        if self.memory is None:
            # In several pieces, as a sparse one is. Those of its `data` would be others.
            if _version(buffer) != self.version:
                buffer.copy_(self.copy)
            return
        if _memory(buffer) != self.memory:
            buffer.data = self.data
        # Not only if it was written: torch does not count what the kernels of BatchNorm write.
        # Through `data`, so that this is not counted as a write of an evaluation.
        buffer.data.copy_(self.copy)


class KeptBuffers:
    """The buffers of a model as they are now, to be put back. As a context it puts them back after
    an error too, unless :meth:`let_go` was called.

    Args:
        model: None keeps nothing.
        plans: the weights that are trained.

    Raises:
        ValueError: a buffer is not there yet; the message names it.
    """

    def __init__(self, model: nn.Module | None = None, plans: Sequence[Plan] = ()) -> None:
        self._modules: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._kept: dict[int, _Kept] = {}
        self._over = False
        if model is None:
            return
        weights = _Weights(plans)
        for prefix, module in model.named_modules():
            buffers: dict[str, Tensor | None] = dict(module._buffers.items())
            self._modules.append((module, buffers))
            for name, buffer in buffers.items():
                if buffer is None or id(buffer) in self._kept:
                    continue
                if is_lazy(buffer):
                    raise ValueError(
                        f"the module buffer {_joined(prefix, name)} has no shape yet, so that it "
                        "cannot be put back: evaluate the model once before the first step"
                    )
                if _can_be_written(buffer) and not weights.share(buffer):
                    data = buffer.detach()
                    marks = _memory(buffer), _version(buffer)
                    self._kept[id(buffer)] = _Kept(buffer, data, *marks, data.clone())

    def put_back(self) -> None:
        """Their values, their memory, and the tensor objects that the modules had."""
        for module, buffers in self._modules:
            now = dict(module._buffers.items())
            for name in now.keys() - buffers.keys():
                del module._buffers[name]
            for name, buffer in buffers.items():
                if name not in now or now[name] is not buffer:
                    module._buffers[name] = buffer
        for kept in self._kept.values():
            kept.put_back()

    def let_go(self) -> None:
        """They stay as they are from now on, whatever happens."""
        self._over = True

    def __enter__(self) -> KeptBuffers:
        return self

    def __exit__(self, error: type[BaseException] | None, *others: object) -> None:
        if error is not None and not self._over:
            self.put_back()


class BufferMarks:
    """By which it is seen that somebody has written or replaced buffers of a model since.

    torch counts writes, which is cheap to look at, but not those of ``F.batch_norm``. Where a
    module of torch's own calls that, its count of batches tells; of others it is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._marks, self._alive = self._look()  # alive, so that no other is taken for one of them

    def written(self, plans: Callable[[], Sequence[Plan]]) -> list[str]:
        """The names of those that were, also of new and removed ones. Those over the memory of the
        weights in ``plans`` are weights, which a step writes."""
        now, buffers = self._look()
        keys = [key for key in {**self._marks, **now} if self._marks.get(key) != now.get(key)]
        if not keys:
            return []
        weights = _Weights(plans())
        modules = {id(module): (name, module) for name, module in self._model.named_modules()}
        found: dict[str, None] = {}  # a set that keeps its order
        for key in keys:
            number, name = key
            buffer = buffers.get(key, self._alive.get(key))
            prefix, module = modules.get(number, ("", None))
            if buffer is not None and not weights.share(buffer):
                also = _WITH_COUNT if name == "num_batches_tracked" else ()
                for each in (*also, name):
                    if each == name or getattr(module, each, None) is not None:
                        found[_joined(prefix, each)] = None
        return list(found)

    def _look(self) -> tuple[dict[_Key, tuple[object, ...]], dict[_Key, Tensor]]:
        marks: dict[_Key, tuple[object, ...]] = {}
        buffers: dict[_Key, Tensor] = {}
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    marks[id(module), name] = id(buffer), _memory(buffer), _version(buffer)
                    buffers[id(module), name] = buffer
        return marks, buffers


_Key = tuple[int, str]  # of a module and its buffer

_WITH_COUNT = ("running_mean", "running_var")
"""What BatchNorm writes when it counts a batch."""


def tracking(model: nn.Module) -> list[str]:
    """Names of the modules that will write running statistics when they are evaluated."""
    return [
        name or "the model"
        for name, module in model.named_modules()
        # Not by their types: other libraries have norms with the same habits.
        if module.training
        and getattr(module, "track_running_stats", False)
        and getattr(module, "running_mean", None) is not None
    ]


class _Weights:
    """The memory of trained weights. A buffer over it is a weight, and the step's own affair."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._on: dict[int, list[Tensor]] = {}
        for tensor in (segment.tensor for plan in plans for segment in plan):
            if tensor.numel():
                self._on.setdefault(_storage(tensor), []).append(tensor)

    def share(self, buffer: Tensor) -> bool:
        """Whether the buffer has memory of theirs."""
        if _memory(buffer) is None or not buffer.numel():
            return False
        begin, end = _extent(buffer)
        spans = map(_extent, self._on.get(_storage(buffer), ()))
        return any(begin < last and first < end for first, last in spans)


def _memory(buffer: Tensor) -> _Memory | None:
    """None for a tensor that is not in one piece of memory, or not there yet."""
    return memory_of(buffer) if not is_lazy(buffer) and _has_memory(buffer) else None


def _version(buffer: Tensor) -> int | None:
    """How often it was written. Inference tensors do not count."""
    return None if buffer.is_inference() else buffer._version


def _can_be_written(tensor: Tensor) -> bool:
    """Of an expanded tensor one element is many, and torch refuses to write it."""
    return not _has_memory(tensor) or all(
        step or size <= 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
