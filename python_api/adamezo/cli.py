"""The ``adamezo`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (default: the process's) and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="adamezo", description="Fine-tune language models with forward passes only."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_finetune(commands.add_parser("finetune", help="fine-tune a local model on a CSV file"))
    _add_replay(commands.add_parser("replay", help="recompute the weights of a logged run"))
    chosen = vars(parser.parse_args(arguments))
    run: dict[str, Callable[..., int]] = {"finetune": _finetune, "replay": _replay}
    try:
        return run[chosen.pop("command")](**chosen)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"adamezo: {error}", file=sys.stderr)
        return 1


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    from .finetune import Options

    for option in fields(Options):
        settings = dict(option.metadata)
        if option.default is not MISSING:
            settings["default"] = option.default
            if option.default is not None:
                settings["help"] += f" (default: {option.default})"
                settings.setdefault("type", type(option.default))
        elif option.default_factory is MISSING:
            settings["required"] = True
        parser.add_argument(f"--{option.name.replace('_', '-')}", **settings)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("finetune"),
        help="folder for report.json and curves.png (default: finetune)",
    )


def _finetune(*, output: Path, label_words: list[str] | None, **chosen: object) -> int:
    from . import finetune
    from .finetune import report

    words = {}
    for pair in label_words or ():
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
        help="the weights at the beginning of the log: a .safetensors file, a state_dict by "
        "torch.save, a folder of a transformers model, or a .gguf file",
    )
    parser.add_argument(
        "log", help="file that `adamezo finetune --log` or adamezo.runlog.StepLog has written"
    )
    parser.add_argument(
        "--out",
        required=True,
        help="file for the weights (.safetensors, .pt, .pth, .bin); for a model also a folder",
    )
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="the step to stop after (default: the last one)"
    )


def _replay(*, base: str, log: str, out: str, until: int | None) -> int:
    from . import runlog

    progress: runlog.Progress = iter
    with suppress(ImportError):  # the progress bar is not a requirement
        from tqdm import tqdm

        progress = partial(tqdm, desc="replaying", unit="step")
    steps = runlog.replay_file(base, log, out, until=until, progress=progress)
    print(f"{out}: the weights after {steps} steps")
    return 0
