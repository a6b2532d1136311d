"""The ``adamezo`` command: its entry, which needs nothing but torch to say what it needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (default: the process's) and returns its exit code.

    Errors of what was given are one line on the standard error and exit code 1.

    Raises:
        SystemExit: with code 2, for arguments that the command does not have.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"adamezo: the command line needs {error.name}, which is not installed: "
            "pip install 'adamezo[cli]'",
            file=sys.stderr,
        )
        return 1
    from .command.app import run

    return run(sys.argv[1:] if arguments is None else list(arguments))
