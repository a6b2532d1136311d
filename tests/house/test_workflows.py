"""Workflows and hooks hold no logic: each command is a make target or a script that is there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE)) | {
    name for name in ("PY", "TESTS", "NVCC") if re.search(rf"ifdef {name}\b|\$\({name}\)", MAKEFILE)
}
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def complaint(command: str) -> str:
    """What is wrong with one command of a workflow; empty where nothing is."""
    if re.search(r"[\n;|&<>`]|\$\(", command.strip()):
        return f"{command!r} has logic of its own: move it to a target of the Makefile"
    program, *words = shlex.split(command)
    if program != "make":
        script = ROOT / program
        runs = "/" in program and script.is_file() and os.access(script, os.X_OK)
        return "" if runs else f"{command!r}: {program} is neither make nor a script that runs"
    assigned = dict(word.split("=", 1) for word in words if "=" in word)
    targets = {word for word in words if "=" not in word}
    if not targets or not targets <= TARGETS:
        return f"{command!r}: the targets are {sorted(targets)}, those there {sorted(TARGETS)}"
    if not set(assigned) <= VARIABLES:
        return f"{command!r} sets {sorted(assigned)}; the Makefile reads {sorted(VARIABLES)}"
    if not all((ROOT / path).exists() for path in assigned.get("TESTS", "").split()):
        return f"{command!r}: there is no {assigned['TESTS']}"
    return ""


def rows(job: dict) -> list[dict[str, str]]:
    """What each row of a job's matrix puts in the place of `matrix.name`."""
    matrix = job.get("strategy", {}).get("matrix", {})
    lists = [[{name: value} for value in values] for name, values in matrix.items()]
    (only,) = lists or [[{}]]  # one list of values, or one of rows under "include"
    return [row.get("include", row) for row in only]


def commands(workflow: dict) -> Iterator[str]:
    """Every command that a workflow runs, once for each row of its job's matrix."""
    for job in workflow["jobs"].values():
        for row in rows(job):
            values = {f"matrix.{name}": str(value) for name, value in row.items()}
            for step in job["steps"]:
                if "run" in step:
                    yield EXPRESSION.sub(lambda found, v=values: v[found[1]], step["run"])


# By the whole version: of an action that is not GitHub's, nobody here reads what @vN becomes.
PUBLISH = re.compile(r"pypa/gh-action-pypi-publish@v\d+\.\d+\.\d+")


def publishes(job: dict) -> bool:
    return any(PUBLISH.fullmatch(step.get("uses", "")) for step in job["steps"])


def complaints_of_publishing(name: str, job: dict, others: set[str]) -> list[str]:
    """A job that may speak for the project runs nothing of it, on a tag, after all other jobs."""
    wrong = []
    if job.get("permissions") != {"id-token": "write"} or "environment" not in job:
        wrong.append(f"job {name} needs an environment, and id-token: write alone")
    if any("run" in step or "checkout" in step.get("uses", "") for step in job["steps"]):
        wrong.append(f"job {name} runs code beside publishing")
    if "refs/tags/v" not in job.get("if", "") or set(job.get("needs", ())) != others:
        wrong.append(f"job {name} publishes without a tag, or without waiting for {others}")
    return wrong


def complaints(text: str) -> list[str]:
    """What is wrong with the text of a workflow."""
    workflow = yaml.safe_load(text)
    wrong = [said for command in commands(workflow) if (said := complaint(command))]
    if workflow.get("permissions") != {"contents": "read"}:
        wrong.append(f"permissions: {workflow.get('permissions')}, not contents: read")
    publishing = {name for name, job in workflow["jobs"].items() if publishes(job)}
    if workflow.get("concurrency", {}).get("cancel-in-progress") is not (not publishing):
        wrong.append("a new run cancels the old one of its branch, unless that publishes")
    for name, job in workflow["jobs"].items():
        if "timeout-minutes" not in job:
            wrong.append(f"job {name} has no timeout-minutes")
        if name in publishing:
            wrong += complaints_of_publishing(name, job, set(workflow["jobs"]) - {name})
        elif "permissions" in job:
            wrong.append(f"job {name} has permissions of its own, and does not publish")
        elif not any("run" in step for step in job["steps"]):
            wrong.append(f"job {name} runs nothing")
        for step in job["steps"]:
            used = step.get("uses", "actions/none@v0")
            if not (re.fullmatch(r"actions/[a-z-]+@v\d+", used) or PUBLISH.fullmatch(used)):
                wrong.append(f"job {name} uses {step['uses']}, not an action of GitHub's by @vN")
    if "://" in text:
        wrong.append("names a host")
    return wrong


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_each_command_is_a_target_or_a_script(file):
    assert complaints(file.read_text()) == []


def test_every_check_of_ci_has_a_job():
    phases = set(re.findall(r"^ *phase ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.M))
    assert {"lint", "docs", "nvcc", "wheel", "stress"} <= phases
    called = {
        word
        for file in WORKFLOWS
        for command in commands(yaml.safe_load(file.read_text()))
        for word in command.split()
    }
    others = {"test-all", "test-integrations", "newcomer", "gpu-check", "gpu-bench"}
    others |= {"sdist", "wheels", "wheel-check"}
    assert phases - {"setup"} | others <= called


def test_the_matrix_has_the_oldest_and_the_tested_versions():
    project = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    oldest = re.search(r'dependencies = \["torch>=([\d.]+)"\]', project)[1]
    tested = re.search(r"^TORCH \?= (\S+)$", MAKEFILE, re.MULTILINE)[1]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    found = [(row["python"], row["torch"]) for row in rows(workflow["jobs"]["test"])]
    assert {(python, f"torch=={oldest}.0"), (python, tested), ("3.13", tested)} <= set(found)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("run: make lint", "run: make lnit"),
        ("run: make lint", "run: make LINT=1"),
        ("run: make lint", "run: make lint COLOR=1"),
        ("run: make lint", "run: make test TESTS=tests/no_such_file.py"),
        ("run: make lint", "run: make lint || true"),
        ("run: make lint", "run: |\n          make lint\n          make test"),
        ("run: make lint", "run: .ci/walk"),
        ("run: make lint", "run: ruff check ."),
        ("options: CONSTRAINTS=\n", "options: NO_SUCH_OPTION=1\n"),
        ("contents: read", "contents: write"),
        ("cancel-in-progress: true", "cancel-in-progress: false"),
        ("actions/checkout@v6", "actions/checkout@main"),
        ("actions/checkout@v6", "someone/checkout@v6"),
    ],
)
def test_a_wrong_one_is_found(right, wrong):
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert right in text
    assert len(complaints(text.replace(right, wrong, 1))) == 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("cancel-in-progress: false", "cancel-in-progress: true"),
        ("pypi-publish@v1.14.2", "pypi-publish@release/v1"),
        ("    environment: pypi\n", ""),
        ("id-token: write", "contents: write"),
        ("refs/tags/v", "refs/heads/main"),
        ("needs: [sdist, wheels, try]", "needs: [sdist, wheels]"),
        (
            "actions/download-artifact@v7\n        with:\n          pattern",
            "actions/checkout@v6\n        with:\n          pattern",
        ),
        ("- run: make sdist", "- run: python -m build"),
    ],
)
def test_a_wrong_release_is_found(right, wrong):
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert right in text
    assert complaints(text.replace(right, wrong, 1))


def test_each_hook_is_a_target_or_a_script():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert entries
    assert [said for entry in entries if (said := complaint(entry))] == []


# What `make docs` and the commit-msg hook call.


def check_links(*files: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / ".ci" / "check_links.py"
    return subprocess.run([sys.executable, script, *files], capture_output=True, text=True)


def test_links_that_lead_somewhere(tmp_path):
    (tmp_path / "other.md").write_text("# A `name_` and [text](x)\n\n## Twice\n\n## Twice\n")
    text = (
        "# Top\n[a](other.md) [b](#top) [c](other.md#twice-1) [d](other.md#a-name_-and-text)\n"
        "[over\nlines](<other.md> 'title') [out](https://example.org/gone) [r]\n\n[r]: other.md\n\n"
        "`[code](gone.md)`\n\n```\n[code](gone.md)\n# no heading\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    done = check_links(tmp_path / "page.md")
    assert (done.returncode, done.stdout) == (0, "1 files, 0 broken links\n")


@pytest.mark.parametrize(
    "link",
    [
        "[a](gone.md)",
        "![a](gone.png)",
        "[a\nb](gone.md 'title')",
        "[a](#no-heading)",
        "[a](other.md#twice-2)",
        "[a](other.md#in-code)",
        "[a](/other.md)",
        "[a]: gone.md",
        "<img src='gone.png'>",
    ],
)
def test_a_link_that_leads_nowhere_is_found(tmp_path, link):
    (tmp_path / "other.md").write_text("## Twice\n\n## Twice\n\n```\n# In code\n```\n")
    (tmp_path / "page.md").write_text(f"# Top\n\n{link}\n")
    done = check_links(tmp_path / "page.md")
    assert done.returncode == 1
    assert "page.md:3: " in done.stdout or "page.md:4: " in done.stdout
    assert done.stdout.endswith("1 files, 1 broken links\n")


BODY = "It was slow because of that.\n"


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh on this machine")
@pytest.mark.parametrize(
    ("message", "said"),
    [
        (f"{'x' * 72}\n\n{BODY}", ""),
        (f"{'x' * 73}\n\n{BODY}", "has 73 characters"),
        (f"Subject\n{BODY}", "second line is not empty"),
        ("Subject\n", "there is no body"),
        ("Subject\n\n# Please enter\n", "there is no body"),
        (f"Subject\n\n# ------------------------ >8 ---\n{BODY}", "there is no body"),
        (f"\n\n{BODY}", "first line is empty"),
        ("Merge branch 'x'\n", ""),
    ],
)
def test_messages_of_commits(tmp_path, message, said):
    (tmp_path / "message").write_text(message)
    done = subprocess.run(
        [ROOT / ".ci" / "commit-msg", tmp_path / "message"], capture_output=True, text=True
    )
    assert done.returncode == (1 if said else 0), done.stderr
    assert said in done.stderr
