"""Every Python block of the README and of docs/ runs; the few that cannot here say why.

The blocks of one page share a namespace, in order. A page may assume what its reader has: a model,
batches, a closure and an optimizer, all of which :func:`stage` makes. What else a block needs is in
an HTML comment before it (``<!-- invisible-code-block: python``), which readers do not see.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sybil import Document, Example
from sybil.parsers.markdown import PythonCodeBlockParser

import adamezo
from helpers import jobs

peft = pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# (page, how the block begins): the reason why it may not run, and whether it runs here.
NEEDS = {
    ("cuda_graphs.md", "optimizer = AdaMeZO("): (
        "captures a CUDA graph; tests/optimizers/test_capturable.py does on a CUDA device",
        False,
    ),
    ("distributed.md", "mesh = init_device_mesh("): (
        "needs 32 ranks with CUDA devices; tests/ranks has smaller meshes",
        False,
    ),
    ("integrations.md", "import lightning"): ("needs lightning", installed("lightning")),
    ("rewards.md", "llm = vllm.LLM("): ("needs vLLM and its GPU", False),
}
# What is shortened, since a page has the model and the numbers of a real run.
SHORTER = {
    "quick_start.md": [("load(smollm2())", 'load("small")')],
    "integrations.md": [("max_steps=20000", "max_steps=3, use_cpu=True, report_to=[]")],
}


@cache
def parsed(page: Path) -> Document:
    """A page with its blocks, and in its namespace what :func:`stage` makes."""
    text = page.read_text(encoding="utf-8")
    for old, new in SHORTER.get(page.name, ()):
        assert text.count(old) == 1, f"{page.name} has no {old!r}: change SHORTER"
        text = text.replace(old, new)
    document = Document(text, str(page))
    for region in PythonCodeBlockParser()(document):
        document.add(region)
    return document


def is_hidden(block: Example) -> bool:
    return block.document.text[block.start :].lstrip().startswith("<!--")


def need(block: Example) -> tuple[str, bool]:
    """Why a block may not run, and whether it runs here."""
    page, code = Path(block.path).name, block.parsed.lstrip()
    for (name, beginning), known in NEEDS.items():
        if page == name and code.startswith(beginning):
            return known
    return "", True


BLOCKS = {
    f"{page.name}:{block.line}": block
    for page in PAGES
    for block in parsed(page).examples()
    if not is_hidden(block)
}


def stage() -> dict[str, Any]:
    """What a reader has: a small language model, batches, a closure, an optimizer."""
    model = jobs.llama()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(len(jobs.VOCABULARY), (3, 4, 6), generator=generator)
    data = [{"input_ids": ids, "labels": ids} for ids in rows]
    return {
        **{name: getattr(adamezo, name) for name in adamezo.__all__},
        "adamezo": adamezo,
        "torch": torch,
        "nn": torch.nn,
        "F": F,
        "peft": peft,
        "model": model,
        "tokenizer": jobs.make_tokenizer(),
        "data": data,
        "steps": len(data),
        "ids": rows[0],
        "mask": torch.ones_like(rows[0]),
        "labels": rows[0],
        "closure": lambda: model(**data[0]).loss,
        "optimizer": adamezo.AdaMeZO.for_model(model, lr=1e-3, seed=0),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each page, in which its blocks run one after the other."""
    return {page.name: tmp_path_factory.mktemp(page.stem) for page in PAGES}


@pytest.fixture(scope="module")
def begun():
    """How many blocks of each page have run."""
    yield (counts := dict.fromkeys((page.name for page in PAGES), 0))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert sum(counts.values()) > 0


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name, folders, begun, monkeypatch):
    block = BLOCKS[name]
    page = Path(block.path).name
    blocks = list(block.document.examples())
    monkeypatch.chdir(folders[page])
    if begun[page] == 0:
        block.document.namespace.update(stage())
    # Those before it too, if only this one was asked for.
    at = next(i for i, other in enumerate(blocks) if other.start == block.start)
    earlier, begun[page] = blocks[begun[page] : at], at + 1
    for each in earlier:
        if need(each)[1]:
            each.evaluate()
    reason, here = need(block)
    if not here:
        compile(block.parsed, page, "exec")
        pytest.skip(reason)
    block.evaluate()


def test_each_exception_is_of_a_block():
    found = {reason for block in BLOCKS.values() if (reason := need(block)[0])}
    assert found == {reason for reason, _ in NEEDS.values()}
    assert len(BLOCKS) > 30
