"""The commands of docs/command_line.md run, on a tiny model and with few steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adamezo import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
MODEL = "$(python -m examples.demo --path)"


def commands() -> list[list[str]]:
    """Those of the page's bash blocks, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_the_commands_of_the_page_run(model_folder, tmp_path, monkeypatch, capsys):
    given = commands()
    kinds = [command[1] for command in given]
    assert kinds == ["finetune", "finetune", "replay", "replay"]
    monkeypatch.chdir(tmp_path)
    for name, *arguments in given:
        assert (name, arguments.count(MODEL)) == ("adamezo", 1)
        arguments = [{MODEL: str(model_folder)}.get(a, a) for a in arguments]
        arguments = [str(ROOT / a) if a.startswith("examples/") else a for a in arguments]
        if arguments[0] == "finetune":
            steps = arguments.index("--steps")
            arguments[steps + 1] = "3"
            arguments += ["--held-out", "20", "--device", "cpu", "--batch-size", "4"]
        assert cli.main(arguments) == 0, capsys.readouterr().err
    for output in ("reviews", "opposites"):
        names = {path.name for path in (tmp_path / output).iterdir()}
        assert {"report.json", "curves.png", "run.log"} <= names
    early = load_file(tmp_path / "reviews" / "early.safetensors")
    late = load_file(tmp_path / "reviews" / "model" / "model.safetensors")
    assert early.keys() == late.keys()
    assert any(not early[name].equal(late[name]) for name in early)


def test_the_page_names_options_that_exist(capsys):
    # What is timed, in tables that are made from results, has commands of others too.
    written = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", PAGE, flags=re.DOTALL)
    named = set(re.findall(r"--[a-z][a-z-]+", written)) - {"--no-deps", "--path", "--help"}
    shown = ""
    for command in ("finetune", "replay", "memory", "doctor", "bench"):
        assert cli.main([command, "--help"]) == 0
        shown += capsys.readouterr().out
    missing = [option for option in named if not re.search(rf"{option}\b", shown)]
    assert not missing
    assert len(named) > 20


@pytest.mark.parametrize("task", ["classification", "lm", "instruct", "multiple-choice"])
def test_the_page_has_every_task(task):
    assert f"| `{task}` |" in PAGE
