"""What a step asks of the other processes that take it too; :mod:`adamezo.distributed` has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from .closure import Result

Made = TypeVar("Made")


class Ranks(Protocol):
    """The processes of one run, each with its part of the evaluations."""

    first: bool
    """Whether this is the one that writes files."""
    lost: str
    """Why the ranks can take no further step together; empty while they can."""

    def begin(self, optimizer: Any) -> None:
        """A step begins. Raises RuntimeError where the ranks can take none together."""

    def own(self, evaluations: int) -> range:
        """Which evaluations of a step are this rank's."""

    def losses(self, results: Sequence[Result], evaluations: int) -> list[float]:
        """The losses of all evaluations, the same on all ranks, from the results of this rank's.

        Raises:
            RuntimeError: on all ranks, as one has raised in its evaluations.
            RanksLost: a rank does not answer, or has come to another step.
        """

    def failed(self, error: BaseException, evaluations: int) -> None:
        """Tells the others that this rank's evaluations raised."""

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What the function returns on the first rank, on all of them; it runs there alone. Where
        it raises there, all raise."""

    def together(self, do: Callable[[], Made]) -> Made:
        """Runs a function on each rank. Where it raises on one, all raise."""


class RanksLost(RuntimeError):
    """The ranks of a run can take no further step together: the job must be started again."""


DISCONNECTED = (
    "{} or another weight is a DTensor, of which each rank holds a piece, and the ranks would step "
    "along losses of their own: call `adamezo.distributed.connect(optimizer, ...)` once, after the "
    "model was sharded"
)
"""An error of a step."""


class Alone:
    """One process without others, for those who ask for :meth:`from_first` and `together`."""

    first = True

    def from_first(self, make: Callable[[], Made]) -> Made:
        return make()

    def together(self, do: Callable[[], Made]) -> Made:
        return do()
