"""The house has one way up: csrc/adamezo, _native, adamezo_kernels, adamezo, then whoever uses it.

Read from the sources, so that a wrong import fails even where nothing runs it. CONTRIBUTING.md says
why each rule is there.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "adamezo_kernels": ROOT / "adamezo_kernels",
    "adamezo": ROOT / "python_api" / "adamezo",
    "adamezo/integrations": ROOT / "python_api" / "adamezo" / "integrations",
    "examples": ROOT / "examples",
    "benchmarks": ROOT / "benchmarks",
}
# What each part may import besides the standard library and itself; "*" is any third-party package.
ALLOWED = {
    "adamezo_kernels": {"torch", "triton"},
    "adamezo": {
        *("torch", "adamezo_kernels", "matplotlib", "typer", "rich", "pandas", "datasets"),
    },
    "adamezo/integrations": {"torch", "adamezo", "adamezo_kernels", "*"},
    "examples": {"torch", "adamezo", "adamezo_kernels", "*"},
    "benchmarks": {"torch", "adamezo", "adamezo_kernels", "examples", "*"},
}
# Departments of adamezo, and which of them each may import; cli.py may import them all.
DEPARTMENTS: dict[str, set[str]] = {
    "engine": set(),
    "methods": {"engine"},
    "fused_step": {"engine", "methods"},
    "distributed": {"engine"},
    "integrations": {"engine", "methods", "distributed"},
    "adapters": {"engine", "integrations"},
    "presets": {"engine", "methods", "adapters"},
    "rewards": {"engine", "integrations"},
    "runlog": {"engine", "methods", "integrations", "adapters"},
    "display": set(),
    "plots": set(),
    "finetune": {
        *("engine", "methods", "distributed", "runlog", "integrations", "adapters"),
        *("presets", "display", "plots"),
    },
    "command": {"engine", "methods", "integrations", "runlog", "display", "finetune"},
}
OURS = {"adamezo", "adamezo_kernels", "benchmarks", "examples", "tests"}


def imports(text: str, package: str) -> Iterator[str]:
    """The absolute names that a module of ``package`` (dotted) imports, late ones too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = [*base, node.module] if node.module else base
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def offences(text: str, part: str, package: str) -> list[str]:
    """What a module of this part imports against the rules."""
    allowed = ALLOWED[part] | {package.split(".")[0]} | sys.stdlib_module_names

    def fine(name: str) -> bool:
        return name in allowed or ("*" in allowed and name not in OURS)

    return [name for name in imports(text, package) if not fine(name.split(".")[0])]


def modules(part: str) -> Iterator[tuple[str, Path]]:
    """(package, file) of every module of this part."""
    for file in sorted(FOLDERS[part].rglob("*.py")):
        if part != "adamezo" or FOLDERS["adamezo/integrations"] not in file.parents:
            inner = file.parent.relative_to(FOLDERS[part]).parts
            yield ".".join([*part.split("/"), *inner]), file


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    found = list(modules(part))
    assert found, f"{part} has no modules: was it moved?"
    for package, file in found:
        assert not offences(file.read_text(), part, package), file.name


def departments_used(text: str, package: str) -> set[str]:
    """The departments of adamezo that a module of ``package`` imports, late ones too."""
    names = [name.split(".") for name in imports(text, package)]
    return {parts[1] for parts in names if parts[0] == "adamezo" and len(parts) > 1}


def test_departments_import_one_way():
    seen = set()
    for package, file in [*modules("adamezo"), *modules("adamezo/integrations")]:
        department = file.stem if package == "adamezo" else package.split(".")[1]
        if department not in ("__init__", "__main__", "cli"):
            seen.add(department)
            others = departments_used(file.read_text(), package) - {department}
            assert others <= DEPARTMENTS[department], f"{file.name} imports {others}"
    assert seen == DEPARTMENTS.keys()


@pytest.mark.parametrize(
    ("package", "text", "wrong"),
    [
        ("adamezo.engine.perturb", "from ...methods import MeZO", "methods"),
        ("adamezo.methods", "from ..runlog import StepLog", "runlog"),
        ("adamezo.runlog", "def f():\n    from adamezo.finetune import run", "finetune"),
    ],
)
def test_a_wrong_import_of_a_department_is_seen(package, text, wrong):
    department = package.split(".")[1]
    assert departments_used(text, package) - DEPARTMENTS[department] == {wrong}


def imports_of_tests(text: str) -> list[str]:
    names = imports(text, "tests.folder")
    return [n for n in names if any(p == "conftest" or p.startswith("test_") for p in n.split("."))]


def test_tests_import_no_tests():
    """What they share is in tests/helpers, so that a file of tests can be moved and split."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 40
    for file in files:
        assert not imports_of_tests(file.read_text()), file.name
    for wrong in ("import test_step", "from golden.test_golden import x", "from conftest import x"):
        assert imports_of_tests(wrong)


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by their names, without the folder."""
    names = sorted(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 40
    assert names == sorted(set(names))


def test_files_fit_a_few_screens():
    for part, most in (("adamezo", 350), ("adamezo/integrations", 350), ("benchmarks", 400)):
        for _, file in modules(part):
            assert len(file.read_text().splitlines()) <= most, f"{file.name} has over {most} lines"


@pytest.mark.parametrize(
    ("part", "package", "text"),
    [
        ("adamezo_kernels", "adamezo_kernels.backends", "import numpy"),
        ("adamezo_kernels", "adamezo_kernels", "def f():\n    from adamezo import AdaMeZO"),
        ("adamezo", "adamezo", "import transformers"),
        ("adamezo", "adamezo", "from examples import demo"),
        ("adamezo/integrations", "adamezo.integrations", "import benchmarks.results"),
        ("examples", "examples", "from tests import conftest"),
    ],
)
def test_a_wrong_import_is_seen(part, package, text):
    assert offences(text, part, package)


def test_relative_and_late_imports_are_understood():
    text = "from ..plan import Plan\nfrom . import native\ndef f():\n    import x.y\n"
    assert list(imports(text, "adamezo_kernels.backends")) == [
        "adamezo_kernels.plan.Plan",
        "adamezo_kernels.backends.native",
        "x.y",
    ]


def test_every_folder_of_modules_is_installed():
    listed = set(
        re.findall(r'"(adamezo[a-z_.]*)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    )
    folders = {
        package for part in ("adamezo_kernels", "adamezo") for package, _ in modules(part)
    } | {"adamezo.integrations"}
    assert listed == folders


def test_torch_is_the_only_hard_dependency():
    """What the extras bring is imported when a command or a function needs it, not before."""
    code = (
        "import sys, torch; before = set(sys.modules); import adamezo, adamezo.cli; "
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names - {"torch"} == {"adamezo", "adamezo_kernels"}


def names_used(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    aliases = (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
    return used | {part for node in aliases for a in node.names for part in a.name.split(".")}


def test_optimizers_know_no_addresses():
    files = [f for part in ("adamezo", "adamezo/integrations") for _, f in modules(part)]
    assert not [f.name for f in files if names_used(f.read_text()) & {"data_ptr", "_native"}]
    assert "data_ptr" in names_used((FOLDERS["adamezo_kernels"] / "backends/native.py").read_text())


def test_only_one_module_imports_the_compiled_one():
    importers = {
        f.name for _, f in modules("adamezo_kernels") if "_native" in names_used(f.read_text())
    }
    assert importers == {"native.py"}


def test_triton_is_imported_when_it_is_needed():
    """By its backend alone: in functions, and by the modules of kernels, which they import."""
    text = {f.name: (f.read_text(), package) for package, f in modules("adamezo_kernels")}
    importers = {
        name
        for name, (source, package) in text.items()
        if any(found.split(".")[0] == "triton" for found in imports(source, package))
    }
    kernels = {"_triton_kernels.py", "_triton_tiles.py", "_triton_products.py"}
    assert importers == {"triton.py"} | kernels
    at_once = [
        node for node in ast.parse(text["triton.py"][0]).body if isinstance(node, ast.Import)
    ]
    assert "triton" not in {alias.name for node in at_once for alias in node.names}
    others = "".join(source for name, (source, _) in text.items() if name != "triton.py")
    assert "import _triton_kernels" not in others


# ---- csrc --------------------------------------------------------------------------------------

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
CORE = r'"adamezo/[a-z0-9_]+\.h'
C_AND_CPP = r"<[a-z0-9_]+"  # <cmath>, but neither <torch/...> nor <cuda_runtime.h>
MAY_INCLUDE = {
    "adamezo": [CORE, C_AND_CPP],
    "cpu": [CORE, C_AND_CPP, r'"cpu/[a-z0-9_]+\.h', r"<immintrin\.h", r"<omp\.h"],
    "cuda": [CORE, C_AND_CPP, r'"cuda/[a-z0-9_]+\.(h|cuh)', r"<cuda[a-z0-9_]*\.h"],
    ".": [C_AND_CPP, r'"(adamezo|cpu|cuda)/[a-z0-9_]+\.h', r"<pybind11/[a-z0-9_]+\.h"],
}
# Anything that would let a compiler or a CPU change a bit of the stream, file by file.
LOOSE = re.compile(r"pragma\s+(GCC\s+(optimize|target)|STDC\s+FP_CONTRACT)|optimize\s*\(|-Ofast")
FAST_FLAGS = re.compile(
    r"-Ofast|fast-?_?math|unsafe-math|associative-math|reciprocal-math|finite-math"
)


def wrong_includes(text: str, folder: str) -> list[str]:
    found = (match.group(1) + match.group(2) for match in INCLUDE.finditer(text))
    return [i for i in found if not any(re.fullmatch(rule, i) for rule in MAY_INCLUDE[folder])]


@pytest.mark.parametrize("folder", MAY_INCLUDE)
def test_includes_run_one_way(folder):
    files = [f for f in (ROOT / "csrc" / folder).iterdir() if f.is_file()]
    assert files, f"csrc/{folder} has no files: was it moved?"
    for file in files:
        assert not wrong_includes(file.read_text(), folder), file.name


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("adamezo", "#include <torch/extension.h>"),
        ("adamezo", "#include <immintrin.h>"),
        ("adamezo", '#include "cpu/loops.h"'),
        ("cpu", "#  include <pybind11/pybind11.h>"),
        ("cpu", "#include <ATen/ATen.h>"),
        ("cuda", '#include "cpu/loops.h"'),
        (".", "#include <torch/all.h>"),
    ],
)
def test_a_wrong_include_is_seen(folder, text):
    assert wrong_includes(text, folder)


def test_nothing_loosens_floating_point():
    """The flags that the compilers are given in the end are read in test_build.py."""
    for file in (ROOT / "csrc").rglob("*.*"):
        assert not LOOSE.search(file.read_text()), file.name
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile"):
        assert not FAST_FLAGS.search((ROOT / name).read_text()), name
    for part in ("adamezo_kernels", "adamezo", "adamezo/integrations"):
        for _, file in modules(part):
            assert "set_flush_denormal" not in names_used(file.read_text()), file.name
