"""Checks the relative links and anchors of Markdown files: python3 .ci/check_links.py FILE...

Prints every link whose file or heading does not exist, and then exits with 1. Links to other hosts
are not followed, so the result depends on the checkout alone.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import unquote

FENCED = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1|\Z)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
# [text](target "title"), [name]: target, <img src="target"> and <a href="target">.
LINKS = (
    re.compile(r"\]\(\s*<?([^\s)>]+)>?[^)]*\)"),
    re.compile(r"^ {0,3}\[[^\]\n]+\]:\s*<?([^\s>]+)", re.MULTILINE),
    re.compile(r"""<(?:img|a)\b[^>]*?\b(?:src|href)=["']([^"']+)["']"""),
)
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", re.MULTILINE)
NAMED = re.compile(r"""<a\b[^>]*?\b(?:id|name)=["']([^"']+)["']""")


def blank(match: re.Match[str]) -> str:
    """The match without its text, with as many lines."""
    return "\n" * match.group().count("\n")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a text."""
    text = FENCED.sub(blank, text)
    found = set(NAMED.findall(text))
    for heading in HEADING.findall(text):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        base = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        slug, count = base, 0
        while slug in found:
            count += 1
            slug = f"{base}-{count}"
        found.add(slug)
    return found


def broken(file: Path) -> list[str]:
    """One line for each link of the file that leads nowhere."""
    text = CODE.sub(blank, FENCED.sub(blank, file.read_text(encoding="utf-8")))
    problems = []
    for link in (match for pattern in LINKS for match in pattern.finditer(text)):
        target = link.group(1)
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
            continue
        path, _, anchor = unquote(target).partition("#")
        where = f"{file}:{text.count(chr(10), 0, link.start(1)) + 1}: {target}"
        aim = file.parent / path if path else file
        if path.startswith("/"):
            problems.append(f"{where}: an absolute path, but links are relative to the file")
        elif not aim.exists():
            problems.append(f"{where}: there is no {aim}")
        elif anchor and aim.suffix == ".md":
            if anchor not in (known := anchors(aim.read_text(encoding="utf-8"))):
                problems.append(f"{where}: {aim} has no such heading, only {sorted(known)}")
    return problems


def main() -> int:
    files = [Path(name) for name in sys.argv[1:]]
    if not files:
        raise SystemExit("check_links: no file was named: python3 .ci/check_links.py README.md ...")
    problems = [line for file in files for line in broken(file)]
    print("\n".join([*problems, f"{len(files)} files, {len(problems)} broken links"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
