"""transformers' Trainer with steps of this package: forward passes only.

All of the Trainer stays as it is but what stages a step. Its loop hands each micro-batch to
``training_step``, which keeps it until the last one of an accumulation, and then takes one step
whose closure evaluates all of them. The loop's own ``optimizer.step()`` has no closure and does
nothing. Several processes take a step together, by losses that they exchange.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..engine.arithmetic import Number
from ..engine.base import Probe
from ..engine.closure import LossSum, checked_loss
from ..engine.optimizer import ZerothOrder
from ..engine.ranks import Alone
from ..methods import HELENE, AdaMeZO
from .accelerate import unwrapped
from .sampled import draw_labels
from .slopes import bounded, slopes

try:
    from transformers import Trainer
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "ZOTrainer needs transformers and accelerate: pip install 'adamezo[transformers]'"
    ) from error

from .trainer_arguments import FP16, check
from .trainer_callbacks import LOG_NAME, Joined, LogSaver, StepCounts, put_copy


class Log(Protocol):
    """What :class:`adamezo.runlog.StepLog` has."""

    @classmethod
    def create(cls, path: str | Path, optimizer: ZerothOrder) -> Log: ...

    @classmethod
    def follow(cls, path: str | Path, optimizer: ZerothOrder) -> Log: ...

    def close(self) -> None: ...


class ZOTrainerMixin:
    """Makes a Trainer take forward-only steps: ``class Mine(ZOTrainerMixin, Trainer)``.

    The optimizer is one of this package: ``optimizer_cls_and_kwargs=(MeZO, {"zo_eps": 1e-3})``
    makes it from ``args`` (lr, seed and weight_decay, unless the options name them) with the
    model's parameters in their order, ``optimizers=(optimizer, None)`` takes one that was made, and
    without either it is :class:`~adamezo.AdaMeZO`. docs/integrations.md says what each of the
    Trainer's arguments does here.

    Args:
        args, kwargs: the Trainer's own.
        objective: None trains the Trainer's loss. ``"f1"`` or ``"exact_match"``, or a function of
            lists of texts (predictions, references) that returns a score for each, are maximized on
            what the model generates; the loss of a step is then minus the mean score.
        max_projected_grad: clips the slope of the loss along each direction of a step to this.
        train_mode: False evaluates with all modules in evaluation mode, as MeZO does. True leaves
            them in train mode: dropout has the same masks in all evaluations of a step.
        step_log: :class:`adamezo.runlog.StepLog` writes ``steps.log`` to the output folder and
            a copy of it into each checkpoint, from which base weights become those of the
            checkpoint. A resumed run continues the copy.

    Raises:
        TypeError, ValueError: an optimizer of another package, or arguments that cannot work with
            forward-only steps; the message says why.
    """

    # What a Trainer has.
    args: Any
    accelerator: Any
    model: Any
    optimizer: Any
    state: Any
    callback_handler: Any
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None
    compute_loss: Callable[..., Tensor]
    compute_loss_context_manager: Callable[[], Any]
    add_callback: Callable[[Any], None]

    def __init__(
        self,
        *args: Any,
        objective: str | Callable[[list[str], list[str]], Any] | None = None,
        max_projected_grad: float | None = None,
        train_mode: bool = False,
        step_log: type[Log] | None = None,
        **kwargs: Any,
    ) -> None:
        if max_projected_grad is not None and not max_projected_grad > 0:
            raise ValueError(
                f"Invalid max_projected_grad: {max_projected_grad!r}, expected a positive number, "
                "or None to clip nothing"
            )
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if getattr(given, "fp16", False):  # before the Trainer makes a scaler, or fails to
            raise ValueError(FP16)
        super().__init__(*args, **kwargs)
        self.train_mode = train_mode
        self.max_projected_grad = max_projected_grad
        self._samples = check(self, objective is not None, train_mode)
        self._objective: Callable[[Any, dict[str, Any]], Tensor] | None = None
        if objective is not None:
            from .objectives import GeneratedScore

            self._objective = GeneratedScore(objective, getattr(self, "processing_class", None))
        self._staged: list[tuple[dict[str, Any], Any]] = []
        self._probes: list[Probe] = []
        self._losses: tuple[Number, ...] = ()
        self._log_kind = step_log
        self._step_log: Log | None = None
        self._checkpoint: str | None = None
        self._counts = StepCounts()
        self.add_callback(self._counts)
        self._log_saver = LogSaver()
        self.add_callback(self._log_saver)
        self.add_callback(Joined())

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own, and an accelerator that leaves DistributedDataParallel out."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Makes the optimizer of all parameters with their names, and lets it know the model."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.optimizer_cls_and_kwargs or (AdaMeZO, {})
            made: Any = kind
            options = {"lr": self.args.learning_rate, "seed": self.args.seed, **options}
            self.optimizer = made(self._groups(model), model=model, **options)
        return self.optimizer

    def _groups(self, model: nn.Module) -> list[Any]:
        """One group in the model's order, as ``for_model`` makes; or two, as the Trainer makes,
        where biases and norms have no weight decay."""
        named = list(model.named_parameters())
        if not self.args.weight_decay:
            return named
        decayed = set(self.get_decay_parameter_names(model))  # type: ignore[attr-defined]
        return [
            {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": weight_decay}
            if weight_decay
            else {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0}
            for weight_decay in (self.args.weight_decay, 0.0)
        ]

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's own, around which the log is opened and closed."""
        found: Any = resume_from_checkpoint or None
        self._checkpoint = get_last_checkpoint(self.args.output_dir) if found is True else found
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._staged = []
            if self._step_log is not None:
                self._step_log.close()
                self._step_log = None
                self._log_saver.active = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next step; those of one that was broken off are dropped."""
        self._staged = []
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Keeps a micro-batch. At the last one of an accumulation takes a step on all of them.

        Returns:
            The mean of the step's losses, a scalar tensor on ``args.device``; 0 before the last.
        """
        prepared = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        self._staged.append((prepared, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        staged, self._staged = self._staged, []
        optimizer = unwrapped(self.optimizer)
        if self._objective is not None and any(g["maximize"] for g in optimizer.param_groups):
            raise ValueError(
                "with an objective the loss of a step is minus its score, and maximize=True would "
                "unlearn it: leave out maximize"
            )
        if self.max_projected_grad is not None:
            optimizer.shaping = bounded(self.max_projected_grad)
        _, _, self._probes = optimizer._next_probes()

        def evaluated(batches: list[tuple[dict[str, Any], Any]]) -> LossSum:
            self._count_forwards(batches)
            return self._loss(model, batches)

        def closure() -> LossSum:
            return evaluated(staged)

        model.train()
        if not self.train_mode:
            # All modules inside. The model's own flag says that this is training, which trl reads.
            for child in self.model.children():
                child.eval()
        try:
            if self._log_kind is not None and self._step_log is None:
                self._step_log = self._open_log(self._log_kind, optimizer)
                self._log_saver.active = (optimizer.ranks or Alone()).first
            loss: Any
            if isinstance(optimizer, HELENE) and self._samples and optimizer.due:
                drawn = (optimizer.ranks or Alone()).together(lambda: self._drawn(model, staged))
                loss = optimizer.step(closure, lambda: evaluated(drawn))
            else:
                loss = optimizer.step(closure)
        finally:
            model.train()
        self._losses = optimizer.losses
        return loss.to(self.args.device, torch.float32)

    def _loss(self, model: nn.Module, staged: list[tuple[dict[str, Any], Any]]) -> LossSum:
        """The loss of an accumulation, at the weights as they are, weighted as the Trainer does.

        The losses of micro-batches are summed exactly. So it has the same bits whether one process
        has evaluated them all or each of several has evaluated some.
        """
        if self._objective is not None:
            with self.compute_loss_context_manager():
                scores = [self._objective(self.model, dict(inputs)) for inputs, _ in staged]
            return LossSum.of(-torch.cat(scores))
        losses = []
        for inputs, items in staged:
            # A copy, of which compute_loss takes the labels out. The context is entered for each
            # loss, as autocast keeps copies of weights until it is left.
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(inputs), num_items_in_batch=items)
            losses.append(loss if isinstance(loss, LossSum) else checked_loss(loss))
        total = reduce(operator.add, map(_as_sum, losses))
        if self._is_scaled(staged[0][1]) and not isinstance(losses[0], LossSum):
            return replace(total, weight=torch.ones_like(total.weight))
        return total

    def _drawn(
        self, model: nn.Module, staged: list[tuple[dict[str, Any], Any]]
    ) -> list[tuple[dict[str, Any], Any]]:
        """The micro-batches with labels that the model draws, at the weights as they are.

        The draws are those of a step and of a micro-batch's place in it, so that a resumed run has
        them again, and so has one process that accumulates the micro-batches of several.
        """
        (direction, _), kind = self._probes[0], getattr(self.model, "loss_type", None)
        self._count_forwards(staged)
        made = []
        for i, (inputs, items) in enumerate(staged):
            place = i * self.accelerator.num_processes + self.args.process_index
            seed = zlib.crc32(repr((direction.key, direction.counter, place)).encode())
            with torch.no_grad(), self.compute_loss_context_manager():
                made.append((draw_labels(kind, model, inputs, seed), items))
        return made

    def _count_forwards(self, batches: list[tuple[dict[str, Any], Any]]) -> None:
        """Those of all processes, which have as many micro-batches each."""
        self._counts.forward_passes += len(batches) * self.accelerator.num_processes

    def _is_scaled(self, items: Any) -> bool:
        """Whether a micro-batch's loss is its share of the whole already, as the Trainer says."""
        said = getattr(self, "loss_is_scaled_for_ga", None)  # of newer versions of transformers
        if said is not None:
            return bool(said)
        takes = self.model_accepts_loss_kwargs  # type: ignore[attr-defined]
        function = self.compute_loss_func  # type: ignore[attr-defined]
        return bool((takes and items is not None) or function is not None)

    def _open_log(self, kind: type[Log], optimizer: ZerothOrder) -> Log:
        """Begins the log, or continues the copy in the checkpoint that the run resumed from."""
        path = Path(self.args.output_dir) / LOG_NAME
        if self._checkpoint is None:
            return kind.create(path, optimizer)
        copy = Path(self._checkpoint) / LOG_NAME

        def take_copy() -> None:
            if not copy.is_file():
                raise FileNotFoundError(
                    f"{copy} is not there: the checkpoint is of a run without step_log, so no log "
                    "can continue it. Leave out step_log, or begin again from the base weights"
                )
            put_copy(copy, path)

        (optimizer.ranks or Alone()).from_first(take_copy)
        return kind.follow(path, optimizer)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's own; ``grad_norm``, of gradients that nobody computes, makes room for
        ``projected_grad`` (the root mean square where a step has several directions)."""
        if "loss" in logs:
            logs.pop("grad_norm", None)
            found = slopes(self._probes, self._losses)
            if found:
                logs["projected_grad"] = (
                    found[0] if len(found) == 1 else (sum(x * x for x in found) / len(found)) ** 0.5
                )
        if "loss" in logs or "train_loss" in logs:
            logs.update(self._counts.numbers())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _as_sum(loss: Any) -> LossSum:
    return loss if isinstance(loss, LossSum) else LossSum.of(torch.as_tensor(loss))


class ZOTrainer(ZOTrainerMixin, Trainer):
    """transformers' Trainer with forward-only steps: see :class:`ZOTrainerMixin`."""
