"""Closures that evaluate several perturbations in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class PerturbedBatch:
    """The batch of one forward: ``count`` blocks of rows, each of which sees the weights perturbed
    in its own way. They are one after the other. All have the same inputs, unless a method such as
    :class:`adamezo.GRZO` divides these: then a block has a part of them."""

    def __init__(
        self,
        count: int,
        rows: set[int] | None = None,
        parts: int = 1,
        which: Sequence[int] | None = None,
    ) -> None:
        self.count = count
        self._rows = set() if rows is None else rows
        self._parts = parts
        self._which = [0] * count if which is None else list(which)

    def repeat(self, inputs: Any) -> Any:
        """Tensors, also in dicts and lists, repeated along their first dimension, so that each
        block has its inputs. Whatever is no tensor, or has no dimensions, stays as it is."""

        def repeated(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            if self.count == self._parts == 1:
                return value
            result = self._repeated(value)
            self._rows.add(result.shape[0])
            return result

        return tree_map(repeated, inputs)

    def _repeated(self, value: Tensor) -> Tensor:
        if value.shape[0] % self._parts:
            raise ValueError(
                f"a batch of {value.shape[0]} rows in {self._parts} parts of equal length: this "
                "method has a direction for each part, so pass as many rows in every step "
                "(drop_last=True in a DataLoader)"
            )
        times, rest = divmod(self.count, self._parts)
        if not rest and self._which == [*range(self._parts)] * times:
            return value.repeat(times, *[1] * (value.dim() - 1))
        pieces: Tensor = value.unflatten(0, (self._parts, -1))
        return pieces[torch.tensor(self._which, device=value.device)].flatten(0, 1)

    def split(self, outputs: Tensor) -> Tensor:
        """Outputs of shape (count * rows, ...) as (count, rows, ...)."""
        if outputs.dim() == 0 or outputs.shape[0] % self.count:
            raise ValueError(
                f"expected outputs for {self.count} blocks of rows, got shape "
                f"{tuple(outputs.shape)}: was the batch repeated, and is the first dimension that "
                "of the rows?"
            )
        blocks: Tensor = outputs.unflatten(0, (self.count, -1))
        return blocks

    def mean(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean loss of each block, of shape (count,).

        Args:
            losses: of each row, or of each token, of shape (count * rows, ...).
            weights: of the losses, such as a mask of tokens: of shape (rows, ...), for the inputs
                as they are and not repeated.
        """
        blocks = self.split(losses).flatten(1)
        if weights is None:
            return blocks.mean(1)
        if weights.numel() != self._parts * blocks.shape[1]:
            raise ValueError(
                f"expected weights for the {self._parts * blocks.shape[1]} losses of the inputs, "
                f"got {weights.numel()}"
            )
        mask = self._repeated(weights.to(blocks.dtype)).view_as(blocks)
        return (blocks * mask).sum(1) / mask.sum(1)


class BatchedClosure:
    """A closure that evaluates several perturbations in one forward (:func:`batched`).

    Called without an argument it is an ordinary closure, of one perturbation.
    """

    def __init__(
        self,
        closure: Callable[[PerturbedBatch], Tensor],
        chunks: int,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self._closure = closure
        self.chunks = chunks
        self.part = part
        self._parts = parts

    def of_part(self, part: int, parts: int) -> BatchedClosure:
        """The same of one of so many equal parts of the inputs."""
        return BatchedClosure(self._closure, self.chunks, part, parts)

    def __call__(self) -> Tensor:
        return self.losses([self.part])[0]

    def losses(self, which: Sequence[int], rows: set[int] | None = None) -> Tensor:
        """The loss of each block, of which ``which`` has the part of the inputs. How many rows it
        repeated goes to ``rows``."""
        count = len(which)
        losses = self._closure(PerturbedBatch(count, rows, self._parts, which))
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            got = (
                f"shape {tuple(losses.shape)}"
                if isinstance(losses, Tensor)
                else type(losses).__name__
            )
            raise ValueError(
                "a batched closure must return a tensor of one loss for each perturbation, here of "
                f"shape ({count},), got {got}: reduce it by `batch.mean(losses)`"
            )
        return losses


def batched(closure: Callable[[PerturbedBatch], Tensor] | None = None, *, chunks: int = 1) -> Any:
    """Makes a closure of a function that evaluates several perturbations at once. Usable as a
    decorator::

        @adamezo.batched
        def closure(batch):
            logits = model(batch.repeat(x))
            return batch.mean(F.cross_entropy(logits, batch.repeat(y), reduction="none"))

    With ``perturbation="regenerated"`` a step then runs one forward of a batch as many times as
    large. With other perturbations it runs one forward for each.

    Args:
        closure: takes a :class:`PerturbedBatch` and returns the loss of each of its blocks.
        chunks: into how many forwards the perturbations of a step are divided, where one batch of
            all would take too much memory for its activations.
    """
    if closure is None:
        return lambda function: batched(function, chunks=chunks)
    if not callable(closure):
        raise TypeError(f"expected a function of a batch, got {type(closure).__name__}")
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks must be an integer of at least 1, got {chunks!r}")
    return BatchedClosure(closure, chunks)


def check_equal(got: Sequence[float], expected: Sequence[float], types: set[torch.dtype]) -> None:
    """Raises RuntimeError if losses of a batch are not those of single forwards.

    A batch rounds elsewhere than single forwards do. Of float32 the loss differs by some 2^-20 of
    its value, and 2^-12 is allowed; but where the losses of a step differ by more than that
    rounding, at most a quarter of their difference, so that blocks in another order are found. Of
    16-bit types 2^-5 is allowed.
    """
    if not all(map(_finite, (*got, *expected))):
        return
    size = max(map(abs, expected))
    most = 2.0**-12 * size
    if types <= {torch.float32, torch.float64}:
        most = min(most, max((max(expected) - min(expected)) / 4, 2.0**-17 * size))
    else:
        most = 2.0**-5 * size
    worst = max(abs(a - b) for a, b in zip(got, expected, strict=True))
    if worst > most:
        raise RuntimeError(
            f"the perturbations of a batch have other losses than alone: {got} and {expected}. "
            "Something in the model or the closure mixes rows of a batch, such as a normalization "
            "over it, or the first dimension of what it computes is not that of the rows. Pass a "
            "closure that is not batched"
        )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
