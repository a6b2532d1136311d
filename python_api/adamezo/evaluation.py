"""An evaluation of a closure: the random numbers that it draws, and the loss that it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Number, quotient, total
from .generators import forked_host_generators

Closure = Callable[[], Tensor | float]


@contextmanager
def forked_generators() -> Iterator[None]:
    """Inside, the generators of torch, and the global ones of Python and numpy, advance as usual;
    on leaving they are back where they were."""
    # All devices in use: a trained CPU tensor may feed a frozen model on a GPU, with dropout there.
    with ExitStack() as stack:
        stack.enter_context(forked_host_generators())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for kind in ("cuda", "xpu"):
            module = torch.get_device_module(kind)
            if module.is_initialized():
                # In a capture torch refuses to tell a generator's state (docs/adamezo.md).
                if kind == "cuda" and torch.cuda.is_current_stream_capturing():
                    continue
                devices = range(module.device_count())
                stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        yield


def checked_loss(loss: Any) -> Tensor | float:
    """What a closure returned, if it is one real number."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"the closure must return one real number, got a tensor of shape "
                f"{tuple(loss.shape)} and dtype {loss.dtype}: reduce it, for example by `mean()`"
            )
        if not loss.is_floating_point():
            raise TypeError(
                f"the closure must return the loss as a floating-point number, got a tensor of "
                f"dtype {loss.dtype}: convert a count by `float()`"
            )
        if loss.is_meta:
            raise ValueError("the closure returned a tensor on the meta device, which has no value")
        # Of its own memory: a closure may return the same tensor again, with another value.
        return loss.detach().clone()
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return float(loss)
    raise TypeError(
        f"the closure must return the loss as a scalar tensor or a number, got "
        f"{type(loss).__name__}" + (": does it lack a `return`?" if loss is None else "")
    )


def numbers(losses: Sequence[Tensor | float]) -> list[float]:
    """All losses as numbers. Those on a GPU are waited for and copied once, and not one by one."""
    tensors = [loss.double().reshape(()) for loss in losses if isinstance(loss, Tensor)]
    if len(tensors) == len(losses) and len({t.device for t in tensors}) == 1:
        return torch.stack(tensors).tolist()
    return [float(loss) for loss in losses]


def mean_loss(losses: Sequence[Number], results: Sequence[Tensor | float]) -> Tensor:
    """What a step returns: of the kind that the last of its results has."""
    mean, last = quotient(total(losses), len(losses)), results[-1]
    if isinstance(mean, Tensor):
        return mean.to(last.dtype) if isinstance(last, Tensor) else mean
    like = last if isinstance(last, Tensor) else None
    return torch.tensor(
        mean,
        dtype=None if like is None else like.dtype,
        device=None if like is None else like.device,
    )
