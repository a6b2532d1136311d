"""A learning rate for a run, from how far weights can be moved at random without harm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .closure import Closure, numbers
from .optimizer import ZerothOrder
from .trial import trial

SHARE = 1 / 30
"""How much of a harmful move a step is, by the searches of docs/find_lr.md: the mean over runs of
2,000 forward passes. Too high an lr does more harm than too low a one."""
HARM = 0.5
"""By what part of itself the loss has risen where a move is harmful."""
SMALLEST, LARGEST = 2.0**-24, 2.0**10


class FoundLr(NamedTuple):
    """What :func:`find_lr` has found."""

    lr: float
    radius: float
    """How far weights can be moved at random, as a root mean square, until the loss has risen by
    half."""
    losses: tuple[tuple[float, float], ...]
    """(a move's size, the mean loss there), as evaluated; the first is (0, the loss)."""
    forwards: int
    """How many forward passes it took."""


@torch.inference_mode(False)
@torch.no_grad()
def find_lr(optimizer: ZerothOrder, closures: Sequence[Closure]) -> FoundLr:
    """A learning rate to begin a search with, in some 30 to 60 forward passes.

    A method that divides by the size of p moves every weight about ``unit_length * lr`` a step,
    whatever the scale of the loss, and mostly at random. Here weights are moved at random by sizes
    that double until the mean loss has risen by half of itself; the lr is the one whose steps are a
    thirtieth of that move. The thirtieth is measured, by the searches of docs/find_lr.md that have
    the best lr beside what is found, and no theory. A constant that is added to the loss changes
    what is half of it, and so the lr.

    Nothing of the run changes: weights have their bits again, and generators, history and lr are as
    they were; module buffers too, such as the statistics of BatchNorm, if the optimizer knows its
    model, as one made by ``for_model`` does. In place it needs a copy of the trained weights in the
    host's memory.

    Args:
        optimizer: AdaMeZO, ScalarAdaMeZO, MEAZO, FZOO, GRZO or ZOAdam, as it is to step.
        closures: of different batches, each as for a step; four or more, as the loss is the mean of
            all, each moved along a direction of its own.

    Returns:
        The lr, for all groups, and what was evaluated. It is not set.

    Raises:
        TypeError, ValueError: a method whose steps depend on the scale of the loss, such as MeZO
            (find the lr of MEAZO, whose steps are MeZO's over one number), or have no typical
            length, such as FZOO's with two directions; nothing to train; losses from which nothing
            follows.

    Warns:
        UserWarning: if the harmful move's loss is not finite. That of a move so large is harm; one
            that had another cause, such as a batch that fails now and then, gives a wrong lr.
    """
    if not isinstance(optimizer, ZerothOrder):
        raise TypeError(f"expected an optimizer of adamezo, got {type(optimizer).__name__}")
    lengths = [optimizer.unit_length(group) for group in optimizer.param_groups]
    known = [length for length in lengths if length is not None]
    if len(known) < len(lengths):
        raise TypeError(
            f"{type(optimizer).__name__} with these options takes steps as long as the loss "
            "differences are large, or of no typical length, so that no lr follows from weights "
            "alone: expected AdaMeZO, ScalarAdaMeZO or ZOAdam with beta2 > 0, MEAZO, FZOO with "
            "three directions or more, or GRZO with three examples or more"
        )
    if optimizer.ranks is not None:
        raise ValueError("find the lr in one process, before the optimizer is connected to others")
    if not (isinstance(closures, Sequence) and closures and all(map(callable, closures))):
        raise TypeError("expected closures: a list of functions, each of which evaluates a batch")
    if len({float(group["lr"]) == 0 for group in optimizer.param_groups}) > 1:
        raise ValueError(
            "some parameter groups have lr = 0 and others have not: expected all weights of the "
            "optimizer to be trained, as all of them are moved; leave the others out of it"
        )
    maximize, *others = {group["maximize"] for group in optimizer.param_groups}
    if others:
        raise ValueError("the parameter groups differ in maximize: expected one direction of harm")
    if not any(p.requires_grad and p.numel() for g in optimizer.param_groups for p in g["params"]):
        raise ValueError(
            "all parameters are frozen or empty, or there are none: expected some with "
            "requires_grad, as an lr is found by moving what is trained"
        )
    losses = _losses(optimizer, closures, maximize)
    small, large = sorted(losses[-2:])
    if not math.isfinite(large[1]):
        warnings.warn(
            f"find_lr took a loss that is not finite for harm: where weights are moved by "
            f"{large[0]:.3g}; by {small[0]:.3g} the mean loss is {small[1]:.4g}, and by nothing "
            f"{losses[0][1]:.4g}. If such moves do not do that to this loss, the lr is wrong: look "
            "for what made it so",
            UserWarning,
            stacklevel=4,  # past torch's two decorators
        )
    radius = _radius(losses, maximize)
    return FoundLr(SHARE * radius / max(known), radius, tuple(losses), len(losses) * len(closures))


def _losses(
    optimizer: ZerothOrder, closures: Sequence[Closure], maximize: bool
) -> list[tuple[float, float]]:
    """(size, mean loss): at 0, and then at sizes by factors of two from zo_eps on, until one of the
    last two has done harm and the other has not."""
    with trial(optimizer, moves=True) as tried:
        # Directions that no run comes to.
        directions = [tried.first._replace(counter=2**32 - 1 - i) for i in range(len(closures))]

        def mean(size: float) -> float:
            # One by one: closures of adamezo.batched would be taken for parts of one batch.
            pairs = zip(closures, directions, strict=True)
            values = numbers([tried.evaluate([of], [(z, size)])[0] for of, z in pairs])
            return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf

        start = mean(0.0)
        if not math.isfinite(start) or start == 0:
            raise ValueError(
                f"the mean loss of the closures is {start if start == 0 else 'not finite'}, "
                "expected a finite number other than 0: harm is measured in parts of it"
            )
        size = min(max(float(tried.options["zo_eps"]), SMALLEST), LARGEST)
        found, factor = [(0.0, start)], 0.0
        while SMALLEST <= size <= LARGEST:
            found.append((size, mean(size)))
            harmful = _rise(found, -1, maximize) >= HARM
            if factor and harmful == (factor > 1):
                return found
            factor = 0.5 if harmful else 2.0
            size *= factor
    raise ValueError(
        f"moves of {found[1][0]:.3g} to {found[-1][0]:.3g} in size take the mean loss from "
        f"{start:.4g} to {found[-1][1]:.4g}, expected that somewhere it "
        f"{'falls' if maximize else 'rises'} by half. Does the "
        "loss depend on the trained weights? If it does and is bounded, it may begin too near its "
        "bound, as that of an untrained model may: then search for an lr by hand"
    )


def _rise(found: Sequence[tuple[float, float]], i: int, maximize: bool) -> float:
    """The rise of the loss, or the fall of what is maximized, as a part of its size at the start;
    infinite where there is no finite loss."""
    start, loss = found[0][1], found[i][1]
    return (start - loss if maximize and math.isfinite(loss) else loss - start) / abs(start)


def _radius(found: Sequence[tuple[float, float]], maximize: bool) -> float:
    """Where the rise is HARM, between the last two sizes: on a power of the size where both are
    rises, as a loss that is curved alike everywhere rises with the square; else on the line over
    the size's logarithm."""
    (low, small), (high, large) = sorted((found[i][0], _rise(found, i, maximize)) for i in (-2, -1))
    if not math.isfinite(large):
        return math.sqrt(low * high)
    if small > 0:
        share = math.log(HARM / small) / math.log(large / small)
    else:
        share = (HARM - small) / (large - small)
    return float(low * (high / low) ** share)
