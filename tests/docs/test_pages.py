"""The commands, make targets and extras that the pages name are there, with their options."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

import adamezo
from adamezo import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Tables that are written from results have the commands of the commits that made these.
MADE = re.compile(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", re.DOTALL)
CODE = re.compile(
    r"^ *```.*?^ *```|(?<!`)`(?:[^`\n]|\n(?!\n))+`(?!`)|^    \S[^\n]*$", re.MULTILINE | re.DOTALL
)
INNER = re.compile(r"\$\(([^)]*)\)")  # a command whose output is an argument of another
MODULE = re.compile(r"\bpython3? -m ((?:adamezo|benchmarks|examples|tests)[\w.]*)(.*)")
QUOTED = re.compile(r"""(["'])(.+?)\1""")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def commands(page: Path) -> list[str]:
    """Each line of the page's code, with continued lines and broken spans in one, $(...) apart."""
    text = MADE.sub("", page.read_text(encoding="utf-8"))
    lines = []
    for code in CODE.findall(text):
        one = re.sub(r"\\\n\s*", " ", code)
        one = one if one.lstrip().startswith("```") else one.replace("\n", " ")
        for line in one.splitlines():
            command = line.split(" #")[0].strip(" `")
            lines += [*INNER.findall(command), INNER.sub("", command)]
    return lines


@cache
def sources(module: str) -> str:
    """The text of the package that has a module: its options are somewhere in it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    return "".join(file.read_text() for file in Path(spec.origin or "").parent.rglob("*.py"))


@cache
def shown(command: str) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.main([command, "--help"]) == 0, f"there is no adamezo {command}"
    return output.getvalue()


def complaints(line: str) -> list[str]:
    """What a command names that is not there."""
    wrong = []
    if module := MODULE.search(line):
        text = sources(module[1])
        options = OPTION.findall(module[2])
        given = OPTION.split(module[2])[0]
        quoted = [found for _, found in QUOTED.findall(given)]
        choices = [*quoted, *re.findall(r"(?<=\s)[a-z_]+(?=\s|$)", QUOTED.sub("", given))]
        wrong += [f"{module[1]} has no {o}" for o in {*options, *choices} if f'"{o}"' not in text]
    if command := re.match(r"(?:\S+=\S+ )*adamezo ([a-z]+)(.*)", line):
        options = OPTION.findall(command[2])
        wrong += [
            f"adamezo {command[1]} has no {o}"
            for o in options
            if not re.search(rf"{o}(?![\w-])", shown(command[1])) and o != "--help"
        ]
    if target := re.match(r"make ([a-z-]+)((?: [A-Z]+=\S*)*)$", line):
        makefile = (ROOT / "Makefile").read_text()
        if not re.search(rf"^[a-z -]*\b{target[1]}\b[a-z -]*:", makefile, re.MULTILINE):
            wrong.append(f"make has no target {target[1]}")
        for name in re.findall(r"([A-Z]+)=", target[2]):
            wrong += [] if name in makefile else [f"the Makefile has no {name}"]
    for extras in re.findall(r"(?:\.|adamezo)\[([a-z,-]+)\]", line):
        project = (ROOT / "pyproject.toml").read_text()
        wrong += [
            f"there is no extra {extra}"
            for extra in extras.split(",")
            if not re.search(rf"^{extra} = \[", project, re.MULTILINE)
        ]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page):
    assert [said for line in commands(page) for said in complaints(line)] == []


def test_enough_commands_were_seen():
    lines = [line for page in PAGES for line in commands(page)]
    assert sum("python -m " in line for line in lines) > 30
    assert sum(line.startswith("adamezo ") for line in lines) > 10
    assert sum(line.startswith("make ") for line in lines) > 20


@pytest.mark.parametrize(
    "line",
    [
        "python -m benchmarks.kernels --no-such",
        "python -m benchmarks.step no_such",
        "python -m benchmarks.evidence 'no such'",
        "adamezo finetune --no-such 1",
        "make no-such",
        "pip install 'adamezo[no-such]'",
    ],
)
def test_what_is_not_there_is_found(line):
    assert len(complaints(line)) == 1


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    linked = set(re.findall(r"\]\((\w+\.md)", index))
    assert names == linked
    assert len(re.findall(r"^\| \d+\. ", index, re.MULTILINE)) == 10


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, re.MULTILINE))
    assert documented == set(adamezo.__all__) - {"__version__"}


def test_the_figures_are_those_that_the_script_draws(tmp_path, monkeypatch):
    figures = ROOT / "docs" / "figures"
    spec = importlib.util.spec_from_file_location("draw", figures / "draw.py")
    assert spec is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.fused_pass()
    draw.regenerated_forward()
    for drawn in tmp_path.iterdir():
        assert drawn.read_text() == (figures / drawn.name).read_text()
    assert len(list(figures.glob("*.svg"))) == len(list(tmp_path.iterdir())) == 2
