"""The site of docs/, built by `make docs`. The pages are Markdown that GitHub shows as well."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The sources of this checkout, also where an installed package is of another one.
sys.path[:0] = [str(ROOT / "python_api"), str(ROOT)]

project = "adamezo"
copyright = "the adamezo authors, Apache-2.0"
try:
    release = metadata.version("adamezo")
except metadata.PackageNotFoundError:
    release = ""

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"adamezo {release}".strip()
# Code in pages is highlighted where a fence names its language, and nothing is guessed elsewhere.
highlight_language = "none"

# Headings get the anchors that GitHub gives them, which the pages' links use.
myst_heading_anchors = 6

napoleon_use_ivar = True  # a property that a docstring lists is described once
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures as they are written; docstrings have the types' meaning
autodoc_preserve_defaults = True

# Names in docstrings are links, and those that lead nowhere are warnings, but for other packages,
# for modules of the inside and for what a "Returns" section calls its results.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|transformers|abc|collections)\..*|Path"),
    (
        r"py:.*",
        r"adamezo\.(methods\.history|engine\.ranks\.Ranks)|adamezo_kernels\.backends\.choose|report\.numbers",
    ),
    (r"py:class", r"Module|rank|m|v"),
]

# Where links to files outside of docs/ lead. A site that is published sets it, such as
# https://host/owner/adamezo/blob/main; without it these files are copied beside the pages.
REPOSITORY = os.environ.get("ADAMEZO_REPOSITORY", "").rstrip("/")
# The pages of the site that show a file of the root.
SHOWN = {"../README.md": "index.md", "../CHANGELOG.md": "changelog.md"}

OUTSIDE = re.compile(
    r"(?<!!)\[(?P<text>[^\[\]]*)\]\((?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
)


def lead_outside(match: re.Match[str]) -> str:
    """A link to a file outside of docs/ in the form that leads somewhere on the site."""
    text, path = match["text"].replace("\n", " "), match["path"]
    if path in SHOWN:
        return f"[{text}]({SHOWN[path]})"
    if REPOSITORY:
        return f"[{text}]({REPOSITORY}/{path.removeprefix('../')}{match['anchor'] or ''})"
    return f"{{download}}`{text.strip('`')} <{path}>`"


def rewrite_links(app, docname, content):
    content[0] = OUTSIDE.sub(lead_outside, content[0])


def link_pages(app, what, name, obj, options, lines):
    """Pages that a docstring names become links."""
    lines[:] = [re.sub(r"\bdocs/(\w+)\.md\b", r":doc:`\1`", line) for line in lines]


COLON = "\ue000"


def hide_colons(app, what, name, obj, options, lines):
    """napoleon takes "text: more" in the docstring of an attribute for a type and a text."""
    if what in ("attribute", "property"):
        lines[:] = [line.replace(":", COLON) for line in lines]


def show_colons(app, what, name, obj, options, lines):
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", hide_colons, priority=400)  # napoleon is at 500
    app.connect("autodoc-process-docstring", show_colons, priority=600)
    app.connect("source-read", rewrite_links)
    app.connect("autodoc-process-docstring", link_pages)
