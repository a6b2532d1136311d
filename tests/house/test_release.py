"""What a release states: one version, extras with floors, wheels and tries of every Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    finetune = next(code for code in shell if code.startswith(newcomer.LONG))
    assert "\\" not in finetune
    assert finetune.endswith("--output run")
    assert all(theirs in finetune for theirs in newcomer.YOURS)
    python = [code for kind, code in found if kind == "python"]
    assert python
    for code in python:
        compile(code, "README.md", "exec")


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


@pytest.mark.parametrize(
    ("kind", "code", "status"),
    [("shell", "true", 0), ("shell", "exit 3", 3), ("python", "raise SystemExit(4)", 4)],
)
def test_the_newcomer_sees_what_fails(tmp_path, kind, code, status):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    assert newcomer.run(kind, code, tmp_path, environment, patience=60) == status


def test_the_newcomer_ends_a_long_run_by_ctrl_c(tmp_path):
    fake = tmp_path / "adamezo"
    fake.write_text("#!/bin/sh\ntrap 'echo stopped > told; exit 130' INT\nsleep 60 & wait\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert newcomer.run("shell", "adamezo finetune --x", tmp_path, environment, patience=1) == 0
    assert (tmp_path / "told").read_text() == "stopped\n"


def test_release_check_is_a_program():
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "check_release.py"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stdout
