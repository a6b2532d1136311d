"""``python -m adamezo``: the command, for launchers that start a module."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
