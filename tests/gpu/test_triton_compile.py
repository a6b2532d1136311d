"""The Triton kernel compiled ahead of time, without a GPU: for every target, what it is made of.
What it computes is in triton_interpreted.py, and on a GPU in test_triton.py."""

from __future__ import annotations

import re

import pytest
import torch

from adamezo_kernels import (
    RULES,
    PhiloxState,
    Plan,
    Terms,
    perturb_,
    update_,
    update_terms_,
)
from adamezo_kernels.backends import triton
from benchmarks import budget
from benchmarks.budget import TARGETS, triton_budget
from benchmarks.budget import compiled_by_triton as compiled
from benchmarks.budget_kernels import Kernel
from benchmarks.results import RESULTS, read
from benchmarks.sass import PIPES
from helpers.interpreted import needs_linker
from helpers.operations import coefficients, states
from helpers.rules import NUMBERS, terms_of

pytestmark = [
    pytest.mark.skipif(bool(budget.without_triton()), reason=budget.without_triton()),
    pytest.mark.skipif(triton.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled"),
]

TYPES = ("float32", "bfloat16", "float16")
# (operation, type, second, stochastic): every one that a call can ask for.
CASES = [
    *(("sample", t, False, False) for t in TYPES),
    *(("perturb", t, False, s) for t in TYPES for s in (False, True)),
    *(("update", t, v, s) for t in TYPES for v in (False, True) for s in (False, True)),
    *(("moment", "float32", v, False) for v in (False, True)),
]


def distributions(target: str) -> tuple[str, ...]:
    """The kinds of directions that the kernel has on a target."""
    return ("exact", "rademacher") if target.startswith("hip") else ("exact", "fast", "rademacher")


def code(kernel) -> str:
    return kernel.asm.get("ptx") or kernel.asm["amdgcn"]


# (operation, rule): those that a call can ask for.
RULE_CASES = [("update", rule) for rule in NUMBERS if RULES[rule].updates]
RULE_CASES += [("perturb", rule) for rule in NUMBERS if RULES[rule].has_direction]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_exact_kernel(target, case):
    needs_linker(target)
    operation, kind, second, stochastic = case
    rounds_as_the_core_says(target, compiled(target, operation, "exact", kind, second, stochastic))


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_rule(target, case):
    """With types of weights and buffers that go round, and stochastic stores where they can be."""
    needs_linker(target)
    operation, rule = case
    for i, kind in enumerate(TYPES):
        kept = TYPES[(i + 1) % 3] if RULES[rule].buffers else ""
        rounds_as_the_core_says(
            target, compiled(target, operation, "exact", kind, False, i != 0, rule, kept)
        )


def rounds_as_the_core_says(target: str, kernel) -> None:
    assert kernel.metadata.enable_fp_fusion is False
    text = code(kernel)
    if target.startswith("cuda"):
        rounded = set(re.findall(r"\t((?:add|sub|mul|fma|sqrt|div|mad)\.[\w.]*f32)\b", text))
        assert rounded <= {
            "add.rn.f32",
            "sub.rn.f32",
            "mul.rn.f32",
            "fma.rn.f32",
            "sqrt.rn.f32",
            "div.rn.f32",
        }, rounded
        assert "approx" not in text
        assert "ftz" not in text
        assert kernel.asm["cubin"]
    else:
        assert re.search(r"\.amdhsa_float_denorm_mode_32\s+3", text)
        assert kernel.asm["hsaco"]


@pytest.mark.parametrize("operation", ["sample", "perturb", "update"])
@pytest.mark.parametrize(
    ("target", "distribution"),
    [(t, d) for t in TARGETS for d in distributions(t) if d != "exact"],
)
def test_the_other_distributions(target, distribution, operation):
    needs_linker(target)
    kernel = compiled(target, operation, distribution)
    approximate = set(re.findall(r"\t(\w+\.approx[\w.]*)", code(kernel)))
    special = {f"{name}.approx.ftz.f32" for name in ("lg2", "sqrt", "sin", "cos")}
    assert approximate == (special if distribution == "fast" else set())


# Of a pair of normals: nine fma of the logarithm, three each of sine and cosine, two of the pair;
# products with 2^-31, of g, f and the sine, and of the radius; and two additions.
FMAS, PRODUCTS, SUMS = 17, 5, 2


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_fused_or_left_out(target):
    needs_linker(target)
    pairs = triton.WINDOWS["sample"] // triton.THREADS // 2
    text = code(compiled(target, "sample", "exact", "float32"))

    def count(*patterns: str) -> int:
        """v_pk_... works on two pairs of numbers."""
        names = re.findall(r"^\t([a-z][\w.]*)", text, re.MULTILINE)
        return sum(
            2 if n.startswith("v_pk") else 1 for n in names for p in patterns if re.fullmatch(p, n)
        )

    if target.startswith("cuda"):
        assert count(r"fma\.rn\.f32") == FMAS * pairs
        assert count(r"mul\.rn\.f32") == PRODUCTS * pairs
        assert count(r"add\.rn\.f32") == SUMS * pairs
        assert count(r"sub\.rn\.f32") in (0, 2 * pairs)  # Triton 3.4: a change of sign
        assert count(r"sqrt\.rn\.f32") == pairs
    else:
        # Roots and the division of a row's number have more of their own.
        assert count(r"v_(pk_)?(fma|fmac|fmaak|fmamk)_f32\w*") >= FMAS * pairs
        assert count(r"v_(pk_)?(add|sub|subrev)_f32\w*") == SUMS * pairs
        assert count(r"v_sqrt_f32\w*") == pairs


# Of an element in buffered.h, with the update's three: a perturbation taken back, decay, the step.
# (fma, products, sums, roots, quotients); common parts once.
OF_A_RULE = {
    "adam": (4, 6, 1, 1, 1),
    "hizoo": (4, 3, 0, 2, 2),
    "helene": (4, 5, 1, 0, 1),
    "adamu": (5, 7, 1, 1, 1),
}


@pytest.mark.parametrize("rule", OF_A_RULE)
def test_nothing_of_a_rule_is_fused_or_left_out(rule):
    elements = triton.WINDOWS["update"] // triton.THREADS
    text = code(
        compiled("cuda:90", "update", "rademacher", "float32", False, False, rule, "float32")
    )
    names = ("fma", "mul", "add", "sqrt", "div")
    got = [len(re.findall(rf"\t{name}\.rn\.f32", text)) for name in names]
    assert got == [n * elements for n in OF_A_RULE[rule]]


def test_the_compiler_can_be_told_not_to_fuse():
    from triton.backends.compiler import GPUTarget

    for target in TARGETS.values():
        assert not triton.can_fuse(GPUTarget(*target))


# --- compilations, counted by Triton's own cache ------------------------------------------------


class Driver:
    """Stands in for a GPU: enough for Triton to compile, nothing to launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS["cuda:90"])


@pytest.fixture
def compilations(monkeypatch):
    """``compilations()``: how many kernels were compiled for calls on CPU tensors, that launch
    nothing."""
    from triton.runtime import driver

    run = triton.kernels().run
    monkeypatch.setattr(triton, "Place", triton.Interpreter)
    monkeypatch.setattr(triton, "supports", lambda device: True)
    monkeypatch.setattr(triton, "availability", lambda: (True, "compiles"))
    monkeypatch.setattr(triton, "_warp", lambda device: 32)
    monkeypatch.setattr(
        triton, "start", lambda grid, *a, **k: run.run(*a, grid=grid, warmup=True, **k)
    )
    before = dict(vars(driver))
    driver.set_active(Driver())
    run.device_caches.clear()
    yield lambda: len(run.device_caches[0][0])
    run.device_caches.clear()
    vars(driver).clear()
    vars(driver).update(before)


def test_no_number_of_a_call_is_compiled_in(compilations):
    """Neither scalars and coefficients nor the key, the offset, the horizon, the number of tensors
    and programs, or where they lie."""

    def step(tensors, horizon, lr, key, offset, eps=1e-8, restore=1e-3):
        some = [PhiloxState(key, 2**32 - 1 - k, offset) for k in range(horizon)]
        sums = coefficients(horizon, True)
        plan = Plan([t.bfloat16() for t in tensors])
        perturb_(plan, some[0], lr, backend="triton")
        update_(plan, some, *sums, lr=lr, eps=eps, restore=restore, backend="triton")

    step([torch.zeros(100)], 1, 1e-3, 1, 0)
    assert compilations() == 2
    many = [torch.zeros(n) for n in range(1, 33)]
    for numbers in (
        ([torch.zeros(100)], 2, 0.0, 0, 1, 1.0, 0.0),
        (many, 16, 1.0, 2**64 - 1, 16),
        (many[:16], 33, -3e38, 2**63, 2**62),
        ([torch.zeros(5000)[1:]], 10, 1e-45, 2**31, 2**31),
    ):
        step(*numbers)
    assert compilations() == 2


def test_a_rule_and_its_buffers_are_compiled_in(compilations):
    """And no number of it, nor whose shape the buffers have."""

    def step(rule, shapes, kept_type, scale):
        plan = Plan([torch.zeros(shape) for shape in shapes])
        plan = plan.with_buffers(
            [[torch.zeros(s, dtype=kept_type) for _ in range(RULES[rule].buffers)] for s in shapes]
        )
        numbers = [scale * n for n in NUMBERS[rule]]
        terms = Terms.of(terms_of(rule).states(), minus_lr=scale, rule=rule, numbers=numbers)
        perturb_(plan, terms, scale, backend="triton")
        update_terms_(plan, terms, restore=scale, backend="triton")

    for expected, rule in ((2, "adam"), (3, "helene"), (5, "hizoo"), (7, "adamu")):
        for shapes, scale in (([3], 1.0), ([5000, (2, 16), 1], 0.0), ([16] * 16, -1.5)):
            step(rule, shapes, torch.float32, scale)
            assert compilations() == expected
    step("hizoo", [3], torch.bfloat16, 1.0)
    assert compilations() == 9


def test_what_a_rule_calls_is_part_of_what_is_compiled():
    """So that Triton's cache of compiled kernels sees a change of any operation that it names."""
    rules = triton.kernels()
    for name, differs in (("adam_step", True), ("adamu_step", True), ("blend_direction", False)):
        keys = {traced[name].cache_key for traced in (rules.RULES, rules.NVIDIA_RULES)}
        assert (len(keys) == 2) == differs


def test_what_is_compiled_in(compilations):
    w = [torch.zeros(9, dtype=t) for t in (torch.float32, torch.bfloat16, torch.float16)]
    perturb_(Plan(w), PhiloxState(0, 0), 1.0, backend="triton")
    assert compilations() == 3
    perturb_(Plan(w[:1]), PhiloxState(0, 0), 1.0, distribution="rademacher", backend="triton")
    assert compilations() == 4
    perturb_(Plan(w[1:2]), PhiloxState(0, 0), 1.0, rounding="stochastic", backend="triton")
    assert compilations() == 5
    update_(Plan(w[:1]), states(3), *coefficients(3, False), lr=1.0, backend="triton")
    assert compilations() == 6


# --- what it costs: benchmarks/budget.py --------------------------------------------------------

# A sixth more than the CUDA kernel's, and room for another compiler.
MOST_PER_NORMAL = {"exact": 41.0, "fast": 26.0, "rademacher": 18.0}
MOST_ONCE = {"exact": 48.0, "fast": 34.0, "rademacher": 29.0}


@pytest.mark.parametrize("distribution", MOST_PER_NORMAL)
def test_instructions_of_a_normal(distribution):
    update = triton_budget(Kernel("update", distribution, False))
    assert update.spilled_bytes == 0
    assert update.registers <= 80
    # No fewer than two thirds either: then the count has lost sight of the loop.
    assert 2 / 3 < update.per_normal / MOST_PER_NORMAL[distribution] <= 1
    perturb = triton_budget(Kernel("perturb", distribution, False))
    assert perturb.spilled_bytes == 0
    assert 2 / 3 < perturb.per_weight / MOST_ONCE[distribution] <= 1


# For an element, its directions included.
# Stochastic weights and bfloat16 buffers; a few per cent of room for another compiler.
MOST_OF_A_RULE = {
    ("update", "adam"): 155.0,
    ("update", "hizoo"): 150.0,
    ("update", "helene"): 145.0,
    ("update", "adamu"): 170.0,
    ("perturb", "hizoo"): 100.0,
    ("perturb", "adamu"): 120.0,
    ("perturb", "blend"): 110.0,
}


@pytest.mark.parametrize("case", MOST_OF_A_RULE, ids="-".join)
def test_instructions_of_a_rule(case):
    operation, rule = case
    kept = "bfloat16" if RULES[rule].buffers else ""
    counted = triton_budget(Kernel(operation, "exact", True, rule, kept))
    assert counted.spilled_bytes == 0
    assert counted.registers <= 96
    assert counted.per_normal == 0
    assert 2 / 3 < counted.per_weight / MOST_OF_A_RULE[case] <= 1


def test_an_aligned_window_takes_four_elements_an_access():
    text = code(compiled("cuda:90", "perturb"))
    assert len(re.findall(r"ld\.global\.v2\.b32", text)) == 4
    assert len(re.findall(r"st\.global\.v2\.b32", text)) == 4


def test_the_budget_is_a_table(tmp_path, monkeypatch):
    """The committed one has the same kernels; its other compiler's rows stay where they are."""
    output = tmp_path / "budget.csv"
    output.write_bytes((RESULTS / "budget.csv").read_bytes())
    monkeypatch.setattr("sys.argv", ["budget", "Triton", "--output", str(output)])
    budget.main()
    key = ["by", "what", "variant", "metric"]
    before, after = (
        dict(read(path).groupby(key)["median"].first()) for path in (RESULTS / "budget.csv", output)
    )
    assert before.keys() == after.keys()
    metrics = 3 + 2 * len(PIPES)  # registers, spilled and moved bytes; of a normal and a weight
    assert len(after) == metrics * (12 + 13 + 12 + len(RULE_CASES))
    at = {tuple(kernel): value for (by, *kernel), value in after.items() if by == "Triton"}
    once, normal = "instructions a weight", "instructions a normal"
    assert at["update", "fast", normal] < at["update", "exact", normal]
    kept = "exact, stochastic, bfloat16 numbers"
    assert at["update", "exact, stochastic", once] < at["update helene", kept, once]
    assert at["perturb blend", "exact, stochastic", once] < at["perturb adamu", kept, once]
