"""Perturbation in the forward itself: modules compute with theta + c z, and no weight is written
or copied.

How a matrix is served depends on the kind of its directions (``served``). A low-rank one costs two
thin products more than x W^T; of a full one, a few displaced rows of W exist at a time. Several
perturbations of one step go through the model as one batch, in blocks of rows, each with its own c
and its own direction.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from adamezo_kernels import Call, Direction, Plan, Terms, kind_of, run
from adamezo_kernels.backends import Backend

from .index import WeightIndex
from .interface import Point, forget_cached_weights
from .served import Blocks, Flipout, Full, Kind, LowRank, SharedDropout, StandIn, stacked
from .watch import Watch

WATCHED_EVERY = 100
"""How many updates there are from one step that is looked at to the next: its operations are
watched for reads of unperturbed weights, and a batched forward is compared with single ones."""

_OTHERWISE = "Take perturbation='out_of_place'"


class Corrected:
    """What forwards of a model need to be corrected, made once for its modules and weights.

    Args:
        model: whose parameters the plans' tensors are.
        plans: the weights of each parameter group.
        distribution, backend: see :func:`adamezo_kernels.perturb_`.
    """

    def __init__(
        self, model: nn.Module, plans: Sequence[Plan], distribution: str, backend: Backend
    ) -> None:
        owned = {id(p) for p in model.parameters()}
        if pieces := [s for plan in plans for s in plan if id(s.tensor) not in owned]:
            raise ValueError(
                f"perturbation='regenerated' with {len(pieces)} DTensors, whose modules gather "
                "weights that are not perturbed: take 'inplace' or 'out_of_place'"
            )
        self.index = index = WeightIndex(model, plans)
        self.distribution = distribution
        self.backend = backend
        self.until_due = 0
        self._refuse_modules(model)
        kinds: dict[str, type[Full] | type[LowRank]] = {"lowrank": LowRank, "flipout": Flipout}
        of_kind = kinds.get(kind_of(distribution)[0], Full)
        self.kind: Kind = of_kind(plans, distribution, backend)
        self.tensors = [segment.tensor for segment in index.segments]
        self.read = {owned.weight for owned in index.owned}
        vectors = [i for i, segment in enumerate(index.segments) if segment.columns == 0]
        self._vectors_in_plans = _by_kind(index.segments, vectors)
        self._vector_plans = [
            Plan(
                [index.segments[i].tensor for i in some],
                parameters=[index.segments[i].parameter for i in some],
                names=[index.names[i] for i in some],
            )
            for some in self._vectors_in_plans
        ]
        self._copies: dict[int, list[tuple[list[Tensor], list[Call]]]] = {}

    def are_of(self, model: nn.Module, plans: Sequence[Plan], distribution: str) -> bool:
        """Whether modules, parameters, their memory and the directions are still the same."""
        return self.distribution == distribution and self.index.is_of(model, plans)

    @property
    def scratch_bytes(self) -> int:
        """The memory of what is kept of directions, of displaced weights and of vectors."""
        copies = [copy for made in self._copies.values() for some, _ in made for copy in some]
        return sum(c.nbytes for c in copies) + self.kind.bytes

    def vectors_at(self, points: Sequence[Point]) -> dict[int, Tensor]:
        """The perturbed vectors, by their place: of shape (points, *shape)."""
        made = self._copies.get(len(points))
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                made = self._copies[len(points)] = self._make_copies(points)
        found: dict[int, Tensor] = {}
        for some, (copies, calls) in zip(self._vectors_in_plans, made, strict=True):
            for point, call in zip(points, calls, strict=True):
                run(call.vary(terms=_terms(point[0]), scale=point[1]), self.backend)
            found.update(zip(some, copies, strict=True))
        return found

    def _make_copies(self, points: Sequence[Point]) -> list[tuple[list[Tensor], list[Call]]]:
        """Memory for the vectors of each plan at so many points, and the calls that fill it."""
        made = []
        for plan in self._vector_plans:
            like = [segment.tensor for segment in plan]
            copies = [
                torch.empty(len(points), *t.shape, dtype=t.dtype, device=t.device) for t in like
            ]
            calls = [
                Call(
                    "perturb",
                    plan.into([copy[k] for copy in copies]),
                    _terms(direction),
                    self.kind.vectors,
                )
                for k, (direction, _) in enumerate(points)
            ]
            made.append((copies, calls))
        return made

    @staticmethod
    def _refuse_modules(model: nn.Module) -> None:
        """Refuses modules that read their weights where no function can be corrected."""
        for name, module in model.named_modules():
            if isinstance(module, nn.RNNBase) and any(p.requires_grad for p in module.parameters()):
                raise ValueError(
                    f"{name or 'the model'} is a {type(module).__name__}, whose weights are read "
                    f"inside of torch: perturbation='regenerated' cannot perturb them. {_OTHERWISE}"
                )


class Regenerated:
    """Lets the modules of a model compute with ``theta + scale z``, for the length of one step.

    Args:
        corrected: of the model.
        model: the model.
    """

    perturbations = 0
    broken = False

    def __init__(self, corrected: Corrected, model: nn.Module) -> None:
        self._of = corrected
        self._model = model
        self._points: list[Point] = []
        self._parts: list[int] = []
        self._watch = Watch(self._look)
        self._at_work = False
        self._refusal: RuntimeError | None = None
        self.due = corrected.until_due == 0
        """Whether this step is looked at: see WATCHED_EVERY."""
        self.rows: set[int] = set()
        """How many rows the batches of the closure have, for those who know."""
        self.types = {tensor.dtype for tensor in corrected.tensors}
        """The types of the weights and of what modules have computed from them."""

    def perturb(self, direction: Direction, scale: float) -> None:
        self.perturb_batch([(direction, scale)])

    def perturb_batch(self, points: Sequence[Point], parts: Sequence[int] = (0,)) -> None:
        """Evaluations from now on see a batch of blocks, one for each of the points, each of a part
        of the closure's inputs."""
        self._points, self._parts = list(points), list(parts)
        if len(points) > 1:
            self._refuse_batch()
        forget_cached_weights()

    def restoring(self, group: int) -> float:
        return -0.0

    def restored(self, group: int) -> None:
        if group == 0:
            self._of.until_due = WATCHED_EVERY - 1 if self.due else self._of.until_due - 1

    def restore(self) -> None:
        self._of.kind.forget()
        forget_cached_weights()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        of, points = self._of, self._points
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:
                # Compiled code reads the weights themselves.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            blocks = self._blocks(points)
            vectors = of.vectors_at(points)
            versions = {i: vector._version for i, vector in vectors.items()}
            stand_ins = {i: self._stand_in(i, blocks, vectors.get(i)) for i in of.read}
            stack.callback(self._put_back)
            for owned in of.index.owned:
                owned.parameters[owned.name] = stand_ins[owned.weight]
            if len(points) > 1 and any(module.training for module in self._model.modules()):
                stack.enter_context(SharedDropout(len(points)))
            if self.due:
                stack.enter_context(self._watch)
            yield
        if self._refusal is not None:  # even if the closure has caught it
            raise self._refusal
        for i, version in versions.items():
            if vectors[i]._version != version:
                self._refuse(
                    f"{of.index.names[i]} is written in a forward: with "
                    "perturbation='regenerated' that would be lost. Do it outside of the step"
                )

    def _blocks(self, points: Sequence[Point]) -> Blocks:
        directions: list[Direction] = []
        for direction, _ in points:
            if all(direction is not known for known in directions):
                directions.append(direction)
        self._of.kind.begin(directions)
        which = [
            next(k for k, known in enumerate(directions) if known is direction)
            for direction, _ in points
        ]
        scales = torch.tensor([scale for _, scale in points], dtype=torch.float32)
        return Blocks(
            self._of.kind,
            [_terms(direction) for direction in directions],
            which,
            scales,
            self._working,
            self.rows,
            self._parts,
            self.types,
            self._refuse,
        )

    def _stand_in(self, i: int, blocks: Blocks, vectors: Tensor | None) -> nn.Parameter:
        tensor = self._of.tensors[i]
        if vectors is None:
            return StandIn.of(tensor.detach(), self._of.index.names[i], i, blocks)
        if len(blocks.which) == 1:
            return nn.Parameter(vectors[0], requires_grad=False)
        return stacked(vectors, self._of.index.names[i], blocks)

    def _put_back(self) -> None:
        for owned in self._of.index.owned:
            owned.parameters[owned.name] = owned.parameter

    @contextmanager
    def _working(self) -> Iterator[None]:
        before, self._at_work = self._at_work, True
        try:
            yield
        finally:
            self._at_work = before

    def _look(self, operation: Any, arguments: object) -> None:
        """Looks at an operation before it runs, for a read of an unperturbed weight."""
        if self._at_work:
            return
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor):
                i = self._of.index.under(tensor)
                if i is not None:
                    self._refuse(
                        f"{self._of.index.names[i]} is read by {operation} as it is, and not as a "
                        "parameter of the module that runs: through a view, a detach() or a "
                        "reference that was kept. perturbation='regenerated' corrects what is "
                        f"computed from the parameter. {_OTHERWISE} or 'inplace'"
                    )

    def _refuse_batch(self) -> None:
        for name, module in self._model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                raise ValueError(
                    f"{name or 'the model'} is a {type(module).__name__} in training mode, which "
                    "would take its statistics over the perturbations of a batch: call "
                    "`model.eval()`, or pass a closure that is not batched"
                )

    def _refuse(self, message: str) -> NoReturn:
        self._refusal = RuntimeError(message)
        raise self._refusal


def _terms(direction: Direction) -> Terms:
    return direction if isinstance(direction, Terms) else Terms.of([direction])


def _by_kind(segments: Sequence[Any], some: Sequence[int]) -> list[list[int]]:
    """The places by device and type, as a plan of kernels may have one of each."""
    kinds: dict[object, list[int]] = {}
    for i in some:
        kinds.setdefault((segments[i].tensor.device, segments[i].tensor.dtype), []).append(i)
    return list(kinds.values())
