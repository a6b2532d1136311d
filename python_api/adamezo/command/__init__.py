"""The command line: each command is a module, and ``app.py`` puts them together.

A new command is a module with a function of typer's kind, and a line of ``app.py``. What a command
does belongs to the departments below: modules here read arguments and print.
"""

typed: list[str] = []
"""The arguments of the command that runs, to say how to go on."""
