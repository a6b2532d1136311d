"""What ZOTrainer adds to a Trainer's callbacks: counts of the whole run, copies of its log, and the
beginning of a run of several processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..distributed import connect
from ..engine.optimizer import ZerothOrder
from .accelerate import unwrapped

LOG_NAME = "steps.log"


def put_copy(source: Path, target: Path) -> None:
    """Makes ``target`` a copy of ``source``, as a whole or not at all."""
    temporary = target.with_name(f"{target.name}.copy")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


class StepCounts(TrainerCallback, ExportableState):
    """Numbers of the whole run, also over resumes: they are saved in ``trainer_state.json``."""

    def __init__(self, forward_passes: int = 0, skipped_steps: int = 0) -> None:
        self.forward_passes = forward_passes
        self._skipped_before = skipped_steps
        self._optimizer: ZerothOrder | None = None

    def numbers(self) -> dict[str, int]:
        here = 0 if self._optimizer is None else int(self._optimizer.skipped)
        return {
            "forward_passes": self.forward_passes,
            "skipped_steps": self._skipped_before + here,
        }

    def state(self) -> dict[str, Any]:
        return {"args": self.numbers(), "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        # Read here, as transformers restores callbacks only where that is asked for.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._optimizer = unwrapped(objects["optimizer"])
        self.forward_passes = saved["args"]["forward_passes"]
        self._skipped_before = saved["args"]["skipped_steps"] - int(self._optimizer.skipped)


class LogSaver(TrainerCallback):
    """Puts a copy of the log into each checkpoint. ``active`` while a log is open."""

    def __init__(self) -> None:
        self.active = False

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.active and folder.is_dir():
            put_copy(Path(args.output_dir) / LOG_NAME, folder / LOG_NAME)


class Joined(TrainerCallback):
    """Lets the processes of a run take its steps together, from the weights of the first one.

    What the processes have made before may differ, such as a new head. DistributedDataParallel
    would send them the first one's weights, and users count on that.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if args.world_size > 1:
            optimizer, model = unwrapped(objects["optimizer"]), objects["model"]
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    sent = tensor.detach().contiguous()
                    distributed.broadcast(sent, 0)
                    tensor.copy_(sent)
            if optimizer.ranks is None:
                connect(optimizer)
