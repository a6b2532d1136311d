"""Everything that decides a run: the fields here are the arguments of ``adamezo finetune``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adamezo_kernels import DISTRIBUTIONS, ROUNDINGS, kind_of

from ..adapters.presets import FULL
from ..adapters.schemes import SCHEMES
from ..engine.perturb import PERTURBATIONS, perturbation_named
from ..methods.history import NORMALIZATIONS

DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("constant", "linear")

# Options that a resumed run may change, because they do not affect the weights.
_MAY_CHANGE = ("model", "data", "device", "eval_every", "show", "save_to", "log")


def _option(default: Any, help: str, **argument: Any) -> Any:
    """A field with its default, its help text and other settings for argparse."""
    return field(default=default, metadata={"help": help, **argument})


def _distribution(name: str) -> str:
    try:
        kind_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


@dataclass(frozen=True)
class Options:
    """Everything that decides a run. The help text of each field says what it is."""

    model: str = field(
        metadata={"help": "folder of a transformers causal language model, or a .gguf file"}
    )
    data: str = field(metadata={"help": "CSV file with the columns text and label"})
    template: str = _option("{text} It was {label}", "prompt with {text}, ending with {label}")
    label_words: Mapping[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "the word, one token, that stands for each label (default: the labels)",
            "nargs": "+",
            "metavar": "LABEL=WORD",
        },
    )
    held_out: int = _option(500, "number of rows that are not trained on but measured")
    steps: int = _option(
        100,
        "optimizer steps of two forward passes each; two more passes at the start check that the "
        "loss is a function of the weights",
    )
    batch_size: int = _option(16, "texts in a step")
    max_tokens: int = _option(256, "longer prompts lose their beginning")
    adapt: str = _option(
        FULL,
        "adapters that are trained in place of all weights (docs/adapters.md)",
        choices=(FULL, *SCHEMES),
    )
    lr: float = _option(1e-5, "learning rate")
    lr_schedule: str = _option(
        "constant", "learning rate over the steps; linear ends at zero", choices=SCHEDULES
    )
    zo_eps: float = _option(1e-3, "perturbation scale")
    horizon: int = _option(10, "number of past directions that the moments are made of")
    betas: tuple[float, float] = _option(
        (0.7, 0.9), "decay rates of the two moments; 0 0 is MeZO", nargs=2, type=float
    )
    normalization: str = _option("paper", "scaling of the moments", choices=NORMALIZATIONS)
    warmup_lr: float | None = _option(
        None, "learning rate of horizon + 1 plain MeZO steps at the start", type=float
    )
    weight_decay: float = _option(0.0, "decoupled weight decay")
    distribution: str = _option(
        "exact",
        f"distribution of the directions: {', '.join(DISTRIBUTIONS)}, lowrank:R of rank R, or "
        "flipout:N with normals that N directions share",
        metavar="NAME",
        type=_distribution,
    )
    perturbation: str = _option(
        "inplace",
        "how evaluations see perturbed weights",
        choices=PERTURBATIONS,
        type=perturbation_named,
    )
    rounding: str = _option("stochastic", "rounding of 16-bit weights", choices=ROUNDINGS)
    seed: int = _option(0, "seed of the directions and of the order of the rows")
    dtype: str = _option("float32", "type of the weights", choices=DTYPES)
    device: str = _option("auto", "torch device; auto takes the GPU if there is one")
    eval_every: int = _option(
        0, "steps between evaluations of the held-out rows; 0: before and after only"
    )
    show: int = _option(5, "number of held-out texts to show with the model's answers")
    save_to: str | None = _option(
        None, "folder for the trained model; with --adapt for the adapters alone"
    )
    log: str | None = _option(
        None, "file that gets a few bytes a step; if it exists, the run continues where it ended"
    )

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the run that began its log."""
        fixed = {name: value for name, value in asdict(self).items() if name not in _MAY_CHANGE}
        if self.lr_schedule == "constant":
            del fixed["steps"]  # more of them may follow
        if self.adapt == FULL:
            del fixed["adapt"]  # as in logs of a time when there were no adapters
        return fixed

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by after ``step`` steps."""
        if self.lr_schedule == "constant":
            return 1.0
        if self.lr_schedule == "linear":
            return max(0.0, 1 - step / self.steps)
        raise ValueError(f"--lr-schedule: got {self.lr_schedule!r}, expected one of {SCHEDULES}")
