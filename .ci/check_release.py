"""`make release-check`: whether all that states the version agrees, and the tag, if there is one.

pyproject.toml is the one that people change. The module takes its version from there when it is
compiled (CMakeLists.txt), and `adamezo.__version__` from what is installed.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def found(file: str, pattern: str) -> str:
    match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else "none"


def complaints(tag: str | None = None) -> list[str]:
    """What does not agree with pyproject.toml. Only a tagged version has to be in the changelog."""
    version = found("pyproject.toml", r'^version = "(.*)"$')
    stated = {"CITATION.cff": found("CITATION.cff", r'^version: "?([^"\n]*)"?$')}
    if tag is not None:
        stated["the tag"] = tag.removeprefix("v")
        section = rf"^## \[({re.escape(version)})\] - \d{{4}}-\d\d-\d\d$"
        stated["CHANGELOG.md"] = found("CHANGELOG.md", section)
    return [
        f"{place} has version {other}, pyproject.toml {version}"
        for place, other in stated.items()
        if other != version
    ]


if __name__ == "__main__":
    is_tag = os.environ.get("GITHUB_REF_TYPE") == "tag"
    wrong = complaints(os.environ["GITHUB_REF_NAME"] if is_tag else None)
    print("\n".join(wrong) or "tag, version, changelog and citation agree")
    sys.exit(bool(wrong))
