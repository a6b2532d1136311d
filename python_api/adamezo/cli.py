"""The ``adamezo`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: those of the process); returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="adamezo", description="Fine-tune language models with forward passes only."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_finetune(commands.add_parser("finetune", help="fine-tune a local model on a CSV file"))
    _add_replay(commands.add_parser("replay", help="give the weights of a logged run again"))
    chosen = vars(parser.parse_args(arguments))
    made: dict[str, Callable[..., int]] = {"finetune": _finetune, "replay": _replay}
    command = made[chosen.pop("command")]
    try:
        return command(**chosen)
    except (ValueError, OSError, ImportError) as error:
        print(f"adamezo: {error}", file=sys.stderr)
        return 1


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    from adamezo.finetune import Options

    default = {f.name: None if f.default is MISSING else f.default for f in fields(Options)}

    def add(name: str, help: str, **settings: object) -> None:
        value = default[name.replace("-", "_")]
        shown = "" if value is None else f" (default: {value})"
        if value is not None:
            settings.setdefault("type", type(value))
        parser.add_argument(f"--{name}", default=value, help=help + shown, **settings)  # type: ignore[arg-type]

    add("model", "folder of a transformers causal language model, or a .gguf file", required=True)
    add("data", "CSV file with the columns text and label", required=True)
    add("template", "prompt with {text}, ending with {label}")
    parser.add_argument(
        "--label-words",
        nargs="+",
        metavar="LABEL=WORD",
        default=[],
        help="the word, one token, that stands for each label (default: the labels themselves)",
    )
    add("held-out", "rows kept from training, to measure on")
    add(
        "steps",
        "optimizer steps, of two forward passes each; two more at the start see that the "
        "loss is a function of the weights",
    )
    add("batch-size", "texts a step")
    add("max-tokens", "longer prompts lose their beginning")
    add("lr", "learning rate")
    add("lr-schedule", "over the steps", choices=["constant", "linear"])
    add("zo-eps", "perturbation scale")
    add("horizon", "directions that the moments reach back over")
    add("betas", "decay of the two moments; 0 0 is MeZO", nargs=2, type=float)
    add("normalization", "of the moments", choices=["paper", "bias_corrected", "official"])
    add("warmup-lr", "learning rate of horizon + 1 plain MeZO steps at the start", type=float)
    add("weight-decay", "decoupled weight decay")
    add("distribution", "of the directions")
    add("perturbation", "of the weights, for an evaluation", choices=["inplace", "exact"])
    add("rounding", "of 16-bit weights", choices=["stochastic", "nearest"])
    add("seed", "of the directions and of the order of the rows")
    add("dtype", "type of the weights", choices=["float32", "bfloat16", "float16"])
    add("device", "auto takes the GPU where there is one")
    add("eval-every", "steps between measurements on the held-out rows, 0 for none in between")
    add("show", "held-out texts to show with the model's answers")
    add("save-to", "folder for the trained model")
    add("log", "file that gets a few bytes a step; if it is there, the run goes on where it ended")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("finetune"),
        help="folder for report.json and curves.png (default: finetune)",
    )


def _finetune(*, output: Path, label_words: list[str], **chosen: object) -> int:
    from adamezo import finetune, report

    words = {}
    for pair in label_words:
        label, equals, word = pair.partition("=")
        if not (label and equals and word):
            raise ValueError(f"--label-words: got {pair!r}, expected LABEL=WORD")
        words[label] = word
    chosen["betas"] = tuple(chosen["betas"])  # type: ignore[arg-type]
    options = finetune.Options(label_words=words, **chosen)  # type: ignore[arg-type]
    result = finetune.finetune(options)
    print(report.text(result))
    print("\nwritten: {}, {}".format(*report.write(result, output)))
    return 0


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base",
        help="what the weights were when the log began: a .safetensors file, a state_dict by "
        "torch.save, a folder of a transformers model, or a .gguf file",
    )
    parser.add_argument("log", help="what `adamezo finetune --log` or adamezo.replay.StepLog wrote")
    parser.add_argument(
        "--out",
        required=True,
        help="file for the weights (.safetensors, .pt, .pth, .bin); for a model also a folder",
    )
    parser.add_argument("--until", type=int, metavar="STEP", help="(default: the last step)")


def _replay(*, base: str, log: str, out: str, until: int | None) -> int:
    from adamezo import replay

    try:
        from tqdm import tqdm
    except ImportError:
        progress: replay.Progress = iter
    else:

        def progress(records: Sequence[replay.StepRecord]) -> Iterable[replay.StepRecord]:
            return tqdm(records, desc="replaying", unit="step")

    steps = replay.replay_file(base, log, out, until=until, progress=progress)
    print(f"{out}: the weights after {steps} steps")
    return 0
