"""All commands, and what becomes of their errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import typer

from . import bench, doctor, memory, replaying, typed

_ANY = ("allow_extra_args", "ignore_unknown_options")

app = typer.Typer(
    name="adamezo",
    help="Fine-tune language models with forward passes only: in the memory of inference.\n\n"
    "Begin with `adamezo doctor`, then `adamezo finetune --help`. docs/command_line.md has three "
    "jobs from beginning to end.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

try:
    from . import finetuning
except ImportError as error:  # the other commands do without what it needs
    _missing = str(error)

    @app.command("finetune", context_settings=dict.fromkeys(_ANY, True))
    def _finetune() -> None:
        """Fine-tune a local model on a file of examples (packages that it needs are missing)."""
        raise ImportError(_missing)

else:
    app.command("finetune")(finetuning.command)
app.command("replay")(replaying.command)
app.command("memory")(memory.command)
app.command("doctor")(doctor.command)
app.command("bench")(bench.command)


def run(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code; see :func:`adamezo.cli.main`."""
    typed[:] = arguments
    with warnings.catch_warnings():
        warnings.showwarning = _note  # type: ignore[assignment]
        try:
            code = app(args=list(arguments), prog_name="adamezo", standalone_mode=False)
        except (ValueError, OSError, ImportError) as error:
            return _refused(error)
        except typer.Abort:
            return 130
        except RuntimeError as error:
            return _refused(error)
        except Exception as error:
            if not hasattr(error, "format_message"):  # of typer's or click's, by its version
                raise
            name = getattr(getattr(error, "ctx", None), "command_path", "adamezo")
            print(f"{name}: {error.format_message()} (see {name} --help)", file=sys.stderr)
            raise SystemExit(getattr(error, "exit_code", 2)) from None
    return code if isinstance(code, int) else 0


def _refused(error: BaseException) -> int:
    print(f"adamezo: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _note(message: Warning | str, *where: object) -> None:
    print(f"adamezo: note: {' '.join(str(message).split())}", file=sys.stderr)
