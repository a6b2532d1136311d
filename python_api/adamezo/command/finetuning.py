"""``adamezo finetune``: the fields of the run's options as arguments."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from adamezo_kernels import kind_of

from .. import finetune
from ..engine.perturb import perturbation_named
from ..finetune import Options, checkpoint, launch, report
from ..integrations import transformers as language_models
from ..runlog import LogError
from . import typed

OUTPUT = Path("finetune")
LOG = "run.log"
LONG = 1000
"""Steps from which on the default learning rates are not too small."""


def _run(
    *,
    output: Path,
    overwrite: bool,
    more: list[str] | None,
    label_words: list[str] | None,
    method_option: list[str] | None,
    choice_columns: list[str] | None,
    **chosen: Any,
) -> int:
    if more and not label_words:
        raise typer.BadParameter(f"got {' '.join(more)!r} without an option in front of it")
    given = _pairs("--method-option", method_option or [], "NAME=VALUE")
    options = Options(
        label_words=_pairs("--label-words", [*(label_words or ()), *(more or ())], "LABEL=WORD"),
        method_option={name: _value(text) for name, text in given.items()},
        choice_columns=tuple(choice_columns or ()),
        **chosen,
    )
    log = Path(options.log or output / LOG)
    options = replace(options, log=str(log))
    first = launch.rank() == 0
    if overwrite and first:
        for path in (log, checkpoint.beside(log)):
            if path.exists():  # kept until the next time: what follows may be refused
                path.replace(f"{path}.old")
    if options.lr is None and not options.find_lr and options.steps < LONG and first:
        print(
            f"adamezo: note: without --lr {options.method} takes its default, which is for "
            f"thousands of steps, and here are {options.steps}: see --lr and --find-lr in --help",
            file=sys.stderr,
        )
    # Of float16 nothing was measured.
    in_16_bits = options.dtype == "bfloat16"
    size = 1e-4 if options.zo_eps is None else options.zo_eps
    wanted = 1e-2 if options.adapt == "none" else 1e-3
    if first and options.method == "FZOO" and in_16_bits and size < wanted:
        print(
            f"adamezo: note: with a zo_eps of {size:g} in bfloat16 FZOO ended far behind: give "
            f"--zo-eps {wanted:g}, and {wanted / size:.3g} times the lr, as its steps are "
            "proportional to lr / zo_eps (docs/recipes.md)",
            file=sys.stderr,
        )
    if not sys.stderr.isatty():
        language_models.without_bars()
    try:
        result = finetune.finetune(options)
    except KeyboardInterrupt as stop:
        if not first:
            return 130
        if not log.exists():
            print("\nadamezo: stopped before the first step", file=sys.stderr)
            return 130
        said = "stopped outside of the steps. Those that were taken"
        if isinstance(stop, finetune.Stopped):
            said = f"{stop}. They"
        arguments = [argument for argument in typed if argument != "--overwrite"]
        again = " under the same launcher" if launch.size() > 1 else ""
        print(
            f"\nadamezo: {said} are saved in {log}. The same command goes on{again}:\n"
            f"  {shlex.join(['adamezo', *arguments])}",
            file=sys.stderr,
        )
        return 130
    except LogError as error:
        if "of another run" not in str(error):
            raise
        raise ValueError(
            f"{error}. For another run here, name another --output, or begin anew with --overwrite"
        ) from None
    if not first:
        return 0
    print(report.text(result))
    print("\nwritten: {}, {}".format(*report.write(result, output)))
    if options.save_to:
        print(
            f"the trained {'model' if options.adapt == 'none' else 'adapters'}: {options.save_to}"
        )
    return 0


def _pairs(option: str, texts: Sequence[str], expected: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option}: got {text!r}, expected {expected}")
        if name in pairs:
            raise ValueError(f"{option}: got {name!r} twice, expected it once")
        pairs[name] = value
    return pairs


def _value(text: str) -> Any:
    """A number, a truth value or a list as JSON writes it, or else a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _checked(check: Callable[[str], Any]) -> Callable[[str | None], Any]:
    """What typer calls with a value: an error of the check is one of usage."""

    def callback(value: str | None) -> Any:
        try:
            return value if value is None else check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return callback


def _distribution(name: str) -> str:
    kind_of(name)
    return name


_CHECKS: dict[str, Callable[[str], Any]] = {
    "distribution": _distribution,
    "perturbation": perturbation_named,
}


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    """A field of the options as a parameter that typer reads."""
    how = field.metadata
    default: Any = inspect.Parameter.empty
    if field.default is not MISSING:
        default = field.default
    elif field.default_factory is not MISSING:
        default = None
    if "choices" in how:
        literal: Any = Literal[how["choices"]]
        kind = literal | None if default is None else literal
    elif field.name in ("label_words", "method_option", "choice_columns"):
        kind = list[str] | None
    option = typer.Option(
        f"--{field.name.replace('_', '-')}",
        help=how["help"],
        rich_help_panel=how["group"],
        metavar=how.get("metavar"),
        show_default=how.get("shown", True),
        callback=_checked(_CHECKS[field.name]) if field.name in _CHECKS else None,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _command() -> Callable[..., int]:
    """The function whose signature is the options."""

    def command(**chosen: Any) -> int:
        return _run(**chosen)

    hints: Mapping[str, Any] = get_type_hints(Options)
    output = typer.Option(
        "--output", help="folder for report.json, curves.png and the log", rich_help_panel="Results"
    )
    overwrite = typer.Option(
        "--overwrite",
        help="begin anew, and not where the log in --output ends; it is kept as run.log.old",
        rich_help_panel="Results",
    )
    extra = {
        "output": (Path, output, OUTPUT),
        "overwrite": (bool, overwrite, False),
        "more": (list[str] | None, typer.Argument(hidden=True), None),
    }
    parameters = [_parameter(field, hints[field.name]) for field in fields(Options)]
    parameters += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how]
        )
        for name, (kind, how, default) in extra.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    command.__doc__ = """Fine-tune a local model on a file of examples, with forward passes only.

    The same command continues a run that was stopped. Begin with a model, data and an lr:

        adamezo finetune --model FOLDER --data reviews.csv --label-words bad=terrible good=great
        --lr 1e-3 --lr-schedule linear --save-to trained

        adamezo finetune --task instruct --model FOLDER --data prompts.jsonl --lr 1e-3
    """
    return command


command = _command()
