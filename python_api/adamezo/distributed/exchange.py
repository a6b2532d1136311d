"""The exchange of a step: every rank's losses to every rank, in one all_gather."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..engine.arithmetic import quotient
from ..engine.closure import LossSum, Result, numbers
from ..engine.optimizer import ZerothOrder
from ..engine.ranks import RanksLost
from . import agreement
from .topology import Topology, device_of

Made = TypeVar("Made")

_HEAD, _EACH = 2, 3
"""Numbers of a rank's row: (whether it failed, the token of its options), and for each of its
evaluations (coarse sum, fine sum, weight)."""

_ALIKE = 2.0**-7
"""How far, relative to their size, the losses of ranks may be apart that evaluate the same: a unit
in the last place of bfloat16."""


NO_CAPTURE = (
    "capturable=True on connected ranks: the losses are exchanged on the host, which a captured "
    "step does not wait for. Take capturable=False"
)


class RankFailed(RuntimeError):
    """The evaluations of another rank have raised. The weights are restored on all ranks, and the
    step is not taken, as where this rank's own had raised."""


class Connected:
    """The ranks of a run (:class:`adamezo.engine.ranks.Ranks`); :func:`connect` makes one.

    Args:
        topology: which rank has which part.
        weights: the device of the weights.
        bound: whether a closure waits for other ranks itself, as in a model in pieces.
        check_every: after how many steps the ranks compare their weights; 0 means never.

    Attributes:
        rank, size (int): this rank's place, and how many there are.
        first (bool): whether this rank writes files.
        lost (str): why the ranks can take no further step together; empty while they can.
    """

    def __init__(
        self, topology: Topology, weights: torch.device, bound: bool, check_every: int
    ) -> None:
        self.rank, self.size = topology.me, len(topology.names)
        self.first = topology.me == 0
        self._topology = topology
        self._device = device_of(topology.group, weights)
        self._bound = bound
        self._check_every = check_every
        self._steps = 0
        self._token = 0
        self._state: list[Any] = []
        self.lost = ""

    def begin(self, optimizer: ZerothOrder) -> None:
        if self.lost:
            raise RanksLost(self.lost)
        if optimizer.param_groups[0]["capturable"]:
            raise ValueError(NO_CAPTURE)
        self._state = agreement.state_of(optimizer)
        self._token = agreement.token_of(self._state)
        if self._check_every and self._steps and self._steps % self._check_every == 0:
            self.compare_weights(optimizer)
        self._steps += 1

    def own(self, evaluations: int) -> range:
        parts, mine = self._topology.queries, self._topology.query[self.rank]
        return range(evaluations * mine // parts, evaluations * (mine + 1) // parts)

    def losses(self, results: Sequence[Result], evaluations: int) -> list[float]:
        flat: list[Tensor | float] = []
        for result in results:
            if isinstance(result, LossSum):
                flat += [result.coarse, result.fine, result.weight]
            else:
                flat += [result, 0.0, 1.0]
        rows = self._exchange(0.0, numbers(flat), evaluations)
        if any(row[0] for row in rows):
            self._tell("")
        tokens = [row[1] for row in rows]
        if len(set(tokens)) > 1:
            self._part(tokens)
        return self._means(rows, evaluations)

    def failed(self, error: BaseException, evaluations: int) -> None:
        if self.lost:
            return
        if self._bound:
            # The others are in the middle of a forward, and wait for this rank there.
            self.lost = (
                "the evaluations of this rank have raised, while those of others waited for its "
                "part of the model: the job has to be started again"
            )
            return
        try:
            self._exchange(1.0, [], evaluations)
            self._tell(f"{type(error).__name__}: {error}")
        except (RanksLost, RankFailed):
            pass  # the error of this rank is on its way already

    def compare_options(self, optimizer: ZerothOrder) -> None:
        """Raises RanksLost, on all ranks, where some have other options or another history."""
        self._state = agreement.state_of(optimizer)
        tokens = [row[0] for row in self._gather(torch.tensor([agreement.token_of(self._state)]))]
        if len(set(tokens)) > 1:
            self._part(tokens)

    def compare_weights(self, optimizer: ZerothOrder) -> None:
        """Compares the weights of all ranks that hold the same, in one all_gather of 16 bytes.

        Raises:
            RanksLost: on all ranks, and names those that differ.
        """
        row = torch.tensor(agreement.checksum(optimizer.plans()), dtype=torch.int64)
        rows = self._gather(row)
        by_layout: dict[int, list[tuple[int, int]]] = {}
        for rank, (layout, value) in zip(self._topology.names, rows, strict=True):
            by_layout.setdefault(layout, []).append((rank, value))
        odd = [
            rank
            for same in by_layout.values()
            for rank in agreement.odd_ones([v for _, v in same], [rank for rank, _ in same])
        ]
        if odd:
            self._lose(
                f"before step {optimizer.param_groups[0]['steps'] + 1} the weights of "
                f"{_ranks(odd)} differ from those that others hold of the same: they were not "
                "equal at the start, or were written between steps on some ranks, or memory has "
                "failed. Start again from a checkpoint or the log"
            )

    def from_first(self, make: Callable[[], Made]) -> Made:
        made: list[Any] = [None]
        error: Exception | None = None
        if self.first:
            try:
                made = [(True, make())]
            except Exception as raised:
                error = raised
                made = [(False, _sent(raised))]
        distributed.broadcast_object_list(
            made, self._topology.names[0], self._topology.group, device=self._device
        )
        fine, value = made[0]
        if fine:
            return value
        raise error or value

    def together(self, do: Callable[[], Made]) -> Made:
        error: BaseException | None = None
        made: Any = None
        try:
            made = do()
        except Exception as raised:
            error = raised
        said = self._objects("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        self._raise_failed(said)
        return made

    def _means(self, rows: Sequence[Sequence[float]], evaluations: int) -> list[float]:
        """The mean of each evaluation's loss over all parts of the batch, summed in their order."""
        topology = self._topology
        parts = topology.queries
        means = []
        for i in range(evaluations):
            part = next(p for p in range(parts) if i < evaluations * (p + 1) // parts)
            at = _HEAD + _EACH * (i - evaluations * part // parts)
            coarse = fine = weight = 0.0
            for rank, row in enumerate(rows):
                if topology.query[rank] == part:
                    self._check_alike(rows, rank, at)
                    if topology.leads[rank] and row[at + 2] != 0:
                        coarse += row[at]
                        fine += row[at + 1]
                        weight += row[at + 2]
            if weight == 0:
                raise ValueError(
                    "no rank has a sample in this step: all weights of its losses are 0"
                )
            means.append(quotient(coarse + fine, weight))
        return means

    def _check_alike(self, rows: Sequence[Sequence[float]], rank: int, at: int) -> None:
        """Raises RanksLost if a rank has another loss than the one that evaluates the same."""
        lead = self._topology.leader(rank)
        a, b = rows[rank], rows[lead]
        if lead == rank:
            return
        of_a, of_b = a[at] + a[at + 1], b[at] + b[at + 1]
        apart = abs(of_a - of_b) > _ALIKE * max(abs(of_a), abs(of_b))  # false where one is NaN
        if apart or a[at + 2] != b[at + 2]:
            names = self._topology.names
            self._lose(
                f"ranks {names[lead]} and {names[rank]} have one role in the batch and in the "
                f"directions, and sums of losses {of_b!r} and {of_a!r} of {b[at + 2]} and "
                f"{a[at + 2]} samples: expected the same batch on both, as `model=` says"
            )

    def _exchange(self, failed: float, own: Sequence[float], evaluations: int) -> list[list[float]]:
        most = -(-evaluations // self._topology.queries) * _EACH
        numbers_of = [failed, float(self._token), *own, *[0.0] * (most - len(own))]
        return self._gather(torch.tensor(numbers_of, dtype=torch.float64))

    def _gather(self, row: Tensor) -> list[list[Any]]:
        row = row.to(self._device)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        try:
            distributed.all_gather(rows, row, group=self._topology.group)
            return torch.stack(rows).tolist()
        except Exception as error:
            self._lose(
                f"rank {self._topology.names[self.rank]} had no answer from all ranks after "
                f"{self._steps} steps: {error}. One has ended, or did not come within the timeout "
                "of init_process_group. Start the job again, as torchrun --max-restarts does: it "
                "goes on from its checkpoint or log",
                error,
            )
            raise

    def _lose(self, why: str, cause: Exception | None = None) -> None:
        self.lost = why
        raise RanksLost(why) from cause

    def _objects(self, mine: Any) -> list[Any]:
        objects: list[Any] = [None] * self.size
        distributed.all_gather_object(objects, mine, group=self._topology.group)
        return objects

    def _tell(self, error: str) -> None:
        """Some ranks have failed, and all exchange their errors."""
        self._raise_failed(self._objects(error))

    def _raise_failed(self, said: Sequence[str]) -> None:
        failed = [
            f"rank {rank} raised {error}"
            for rank, error in zip(self._topology.names, said, strict=True)
            if error
        ]
        if failed:
            more = f"; and {len(failed) - 3} more" * (len(failed) > 3)
            raise RankFailed("; ".join(failed[:3]) + more)

    def _part(self, tokens: Sequence[float]) -> None:
        """Ranks have other options or another history, and say which."""
        difference = agreement.first_difference(self._objects(self._state), self._topology.names)
        odd = agreement.odd_ones(tokens, self._topology.names)
        self._lose(
            f"{_ranks(odd)} cannot take this step with the others: {difference}. All ranks need "
            "the same options, schedule, seed and number of steps"
        )


def _ranks(names: Sequence[int]) -> str:
    return f"rank{'s' * (len(names) > 1)} {', '.join(map(str, names))}"


def _sent(error: Exception) -> Exception:
    """An exception as other processes can have it."""
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return copied if isinstance(copied, Exception) else RuntimeError(str(error))
