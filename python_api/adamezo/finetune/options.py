"""Everything that decides a run: the fields here are the arguments of ``adamezo finetune``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from adamezo_kernels import DISTRIBUTIONS, ROUNDINGS

from .. import methods
from ..adapters.schemes import SCHEMES
from ..engine.perturb import PERTURBATIONS
from ..methods.history import NORMALIZATIONS
from ..presets import FULL

KINDS = ("classification", "lm", "instruct", "multiple-choice")
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("constant", "linear")
TEMPLATES = {"classification": "{text} It was {label}", "multiple-choice": "{text} {label}"}
HELD_OUT = 500

METHOD_OPTIONS = ("lr", "zo_eps", "horizon", "betas", "normalization", "warmup_lr", "distribution")
"""Options that are the method's own: where one is None, the method has its default."""

# Options that a resumed run may change: they do not affect the weights, or say how the examples are
# read, which the log has a hash of.
_MAY_CHANGE = {
    *("model", "data", "separator", "encoding", "split", "text_column", "label_column"),
    *("prompt_column", "completion_column", "messages_column", "choice_columns", "label_is"),
    *("chat_template", "loss_on", "sample_tokens", "device", "eval_every", "show", "save_to"),
    *("log", "checkpoint_every", "find_lr"),
}
# Options that logs do not hold where they have their defaults, as they are younger than the logs.
_YOUNGER = ("task", "method", "method_option", "adapt")


def _option(default: Any, help: str, group: str = "Training", **how: Any) -> Any:
    """A field with its default, its help text, and how a command line takes it: ``group``,
    ``choices``, ``metavar``, the default as text (``shown``)."""
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata={"help": help, "group": group, **how})


_METHODS_OWN = "the method's"


@dataclass(frozen=True)
class Options:
    """Everything that decides a run. The help text of each field says what it is."""

    model: str = field(
        metadata={
            "help": "folder of a transformers causal language model, or a .gguf file",
            "group": "Model and data",
        }
    )
    data: str = field(
        metadata={
            "help": "file of examples: .csv, .tsv, .jsonl, .parquet, .txt, or a folder that "
            "datasets has saved",
            "group": "Model and data",
        }
    )
    task: str = _option("classification", "what is learned", "Model and data", choices=KINDS)
    text_column: str | None = _option(
        None, "column of the texts", "Model and data", shown="text", metavar="NAME"
    )
    label_column: str | None = _option(
        None, "column of the labels", "Model and data", shown="label", metavar="NAME"
    )
    prompt_column: str | None = _option(
        None, "instruct: column of the prompts", "Model and data", shown="prompt", metavar="NAME"
    )
    completion_column: str | None = _option(
        None,
        "instruct: column of the completions",
        "Model and data",
        shown="completion",
        metavar="NAME",
    )
    messages_column: str | None = _option(
        None,
        "instruct: column of conversations, lists of messages with role and content",
        "Model and data",
        shown="messages, where there is one",
        metavar="NAME",
    )
    choice_columns: tuple[str, ...] = _option(
        tuple,
        "multiple-choice: column of lists of choices, or a column for each choice",
        "Model and data",
        shown="choices",
        metavar="NAME",
    )
    label_is: str = _option(
        "text",
        "multiple-choice: what a label is of its choice; index counts from 0",
        "Model and data",
        choices=("text", "index", "letter"),
    )
    separator: str | None = _option(
        None, "what separates the columns of a .csv file", "Model and data", shown="a comma"
    )
    encoding: str = _option("utf-8", "encoding of a text file", "Model and data")
    split: str = _option(
        "", "part of a saved dataset that has several", "Model and data", shown="train"
    )
    held_out: int | None = _option(
        None,
        "number of rows that are not trained on but measured",
        "Model and data",
        shown=f"a fifth, {HELD_OUT} at most",
    )
    template: str | None = _option(
        None,
        "prompt with {text}, ending with {label}",
        "Prompt",
        shown="; ".join(f"{task}: {text!r}" for task, text in TEMPLATES.items()),
    )
    label_words: Mapping[str, str] = _option(
        dict,
        "the word or words that stand for each label",
        "Prompt",
        shown="the labels",
        metavar="LABEL=WORD ...",
    )
    max_tokens: int = _option(256, "longer prompts lose their beginning", "Prompt")
    chat_template: str = _option(
        "auto",
        "instruct: auto takes the tokenizer's, none joins plain texts, or a file with a template",
        "Prompt",
        metavar="auto|none|FILE",
    )
    loss_on: str = _option(
        "completion",
        "instruct: tokens that the loss is of",
        "Prompt",
        choices=("completion", "all"),
    )
    steps: int = _option(
        100,
        "optimizer steps, of two forward passes each with most methods; two more passes at the "
        "start check that the loss is a function of the weights",
    )
    batch_size: int = _option(16, "texts in a step")
    lr: float | None = _option(
        None,
        "learning rate. The method's default is for thousands of steps. For a few hundred begin "
        "with 1e-3 (AdaMeZO), 1e-4 (MeZO) or 1e-6 (FZOO; ten times that with --zo-eps 1e-3), with "
        "--adapt lora ten times that, and search by factors of 3",
        shown=_METHODS_OWN,
    )
    find_lr: bool = _option(
        False,
        "find an lr before the first step, in some 30 to 60 forward passes and with a copy of the "
        "trained weights, for methods that divide by the projected gradients (docs/find_lr.md)",
    )
    lr_schedule: str = _option(
        "constant", "learning rate over the steps; linear ends at zero", choices=SCHEDULES
    )
    weight_decay: float = _option(0.0, "decoupled weight decay")
    seed: int = _option(0, "seed of the directions and of the order of the rows")
    dtype: str = _option("float32", "type of the weights", choices=DTYPES)
    device: str = _option("auto", "torch device; auto takes the GPU if there is one")
    method: str = _option(
        "AdaMeZO", "the optimizer (docs/methods.md)", "Method", choices=tuple(methods.__all__)
    )
    method_option: Mapping[str, Any] = _option(
        dict,
        "another option of the method, such as queries=4; may be given again",
        "Method",
        metavar="NAME=VALUE",
    )
    adapt: str = _option(
        FULL,
        "adapters that are trained in place of all weights (docs/adapters.md)",
        "Method",
        choices=(FULL, *SCHEMES),
    )
    zo_eps: float | None = _option(None, "perturbation scale", "Method", shown=_METHODS_OWN)
    perturbation: str = _option(
        "inplace",
        "how evaluations see perturbed weights: " + ", ".join(PERTURBATIONS),
        "Method",
        metavar="NAME",
    )
    distribution: str | None = _option(
        None,
        f"distribution of the directions: {', '.join(DISTRIBUTIONS)}, lowrank:R of rank R, or "
        "flipout:N with normals that N directions share",
        "Method",
        shown=_METHODS_OWN,
        metavar="NAME",
    )
    rounding: str = _option("stochastic", "rounding of 16-bit weights", "Method", choices=ROUNDINGS)
    horizon: int | None = _option(
        None,
        "AdaMeZO: number of past directions that the moments are made of",
        "Method",
        shown=_METHODS_OWN,
    )
    betas: tuple[float, float] | None = _option(
        None,
        "decay rates of the two moments; with AdaMeZO 0 0 is MeZO",
        "Method",
        shown=_METHODS_OWN,
    )
    normalization: str | None = _option(
        None,
        "AdaMeZO: scaling of the moments",
        "Method",
        shown=_METHODS_OWN,
        choices=NORMALIZATIONS,
    )
    warmup_lr: float | None = _option(
        None,
        "AdaMeZO: learning rate of horizon + 1 plain MeZO steps at the start",
        "Method",
        shown="no such steps",
    )
    eval_every: int = _option(
        0, "steps between evaluations of the held-out rows; 0: before and after only", "Results"
    )
    show: int = _option(5, "number of held-out texts to show with the model's answers", "Results")
    sample_tokens: int = _option(
        32, "lm, instruct: most tokens that the model goes on with in a text shown", "Results"
    )
    save_to: str | None = _option(
        None,
        "folder for the trained model; with --adapt for the adapters alone",
        "Results",
        shown="not saved",
    )
    log: str | None = _option(
        None,
        "file that gets a few bytes a step; if it exists, the run continues where it ended",
        "Results",
        shown="run.log in --output",
    )
    checkpoint_every: int = _option(
        0,
        "steps between checkpoints beside the log, from which a run continues without replaying "
        "it; one is as large as what is trained",
        "Results",
    )

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the run that began its log."""
        fixed = {name: value for name, value in asdict(self).items() if name not in _MAY_CHANGE}
        fixed["template"] = self.template or TEMPLATES.get(self.task)
        if self.lr_schedule == "constant":
            del fixed["steps"]  # more of them may follow
        for option in fields(self):
            if option.name in _YOUNGER and fixed[option.name] in (option.default, {}):
                del fixed[option.name]
        return fixed

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by after ``step`` steps."""
        if self.lr_schedule == "constant":
            return 1.0
        if self.lr_schedule == "linear":
            return max(0.0, 1 - step / self.steps)
        raise ValueError(f"--lr-schedule: got {self.lr_schedule!r}, expected one of {SCHEDULES}")
