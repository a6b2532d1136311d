"""Triton's kernels on tiles, of low-rank directions and of products with perturbed weights: in the
interpreter, in a process of its own; compiled ahead of time for every target; and on a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from adamezo_kernels import PhiloxState, Plan, moments, perturb_, perturbed_linear, update_
from adamezo_kernels.backends import products, reference, tiling, triton
from benchmarks import budget
from benchmarks.budget import TARGETS
from benchmarks.budget_kernels import Kernel
from benchmarks.budget_tiles import compiled_product, compiled_tiles, counted, made_of
from helpers.backends import needs_native
from helpers.interpreted import ROOT, in_a_process, installed, needs_linker, needs_triton
from helpers.operations import TYPES, assert_same_bits, coefficients, states, weights
from helpers.products import assert_is_the_product, inputs

compiles = [
    pytest.mark.skipif(bool(budget.without_triton()), reason=budget.without_triton()),
    pytest.mark.skipif(triton.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled"),
]


@needs_triton
@pytest.mark.parametrize("file", ["triton_tiles_interpreted.py", "triton_products_interpreted.py"])
def test_the_interpreter(file):
    """Every test of the file passes; or this Triton is too old for it, and says so."""
    done = in_a_process(
        *("-m", "pytest", "-p", "no:cacheprovider", "-q", str(ROOT / "tests" / "gpu" / file)),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout
    if installed() < (3, 9):
        assert "rounds an fma twice" in done.stdout
        pytest.skip(f"the interpreter of Triton {installed()} rounds an fma twice")
    assert re.search(r"\n\d\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout


# --- compiled -----------------------------------------------------------------------------------


def rounds_as_the_core_says(target: str, kernel, sums: set[str] = frozenset()) -> None:
    """``sums``: the instructions that multiply tiles."""
    assert kernel.metadata.enable_fp_fusion is False
    if target.startswith("cuda"):
        text = kernel.asm["ptx"]
        rounded = set(re.findall(r"\t((?:add|sub|mul|fma|sqrt|div|mad)\.[\w.]*f32)\b", text))
        assert {"mul.rn.f32", "fma.rn.f32", "add.rn.f32", "sqrt.rn.f32"} <= rounded
        assert rounded <= {
            *("add.rn.f32", "sub.rn.f32", "mul.rn.f32", "fma.rn.f32", "sqrt.rn.f32", "div.rn.f32")
        }
        assert "approx" not in text
        assert "ftz" not in text
        assert kernel.asm["cubin"]
    else:
        assert re.search(r"\.amdhsa_float_denorm_mode_32\s+3", kernel.asm["amdgcn"])
        assert kernel.asm["hsaco"]


class TestCompiled:
    pytestmark = compiles

    @pytest.mark.parametrize("target", TARGETS)
    def test_tiles(self, target):
        needs_linker(target)
        for case in (("update", "bfloat16", True, True), ("perturb", "float16", False, False)):
            operation, kind, second, stochastic = case
            kernel = compiled_tiles(target, operation, kind, second, stochastic)
            rounds_as_the_core_says(target, kernel)
            assert kernel.metadata.shared <= 4 * 4 * (tiling.ROWS + tiling.COLUMNS)

    @pytest.mark.parametrize("target", TARGETS)
    def test_products(self, target):
        needs_linker(target)
        for kind, distribution in (("bfloat16", "exact"), ("float32", "exact")):
            rows = products.TILES[kind][0][-1]
            kernel = compiled_product(target, distribution, kind, rows)
            text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
            if target.startswith("cuda"):
                tensor_cores = re.search(r"mma\.sync|wgmma", text)
                # float32 in full: tf32 would round its factors to 11 digits.
                assert bool(tensor_cores) == (kind != "float32")
                assert "tf32" not in text
                rounds_as_the_core_says(target, kernel)

    def test_what_they_cost(self):
        """No register is spilled; the counts are those of budget_tiles.csv, with a sixth of room
        for another compiler."""
        for kernel, registers, normal, weight in (
            (Kernel("update", "lowrank", True), 207, 10.0, 107.0),
            (Kernel("product", "exact", False), 235, 0.0, 59.0),
        ):
            made = counted(kernel)
            assert made.spilled_bytes == 0
            assert made.registers <= registers
            assert 2 / 3 * normal <= made.per_normal <= normal
            assert 2 / 3 * weight <= made.per_weight <= weight

    @pytest.mark.slow
    @pytest.mark.parametrize("rule", ["adam", "hizoo", "helene", "adamu"])
    def test_rules_spill_nothing(self, rule):
        kernel = compiled_tiles("cuda:90", "update", "bfloat16", False, True, rule, "bfloat16")
        rounds_as_the_core_says("cuda:90", kernel)
        _, spilled, _ = made_of(kernel)
        assert spilled == 0


# --- on a GPU: `make gpu-check` -----------------------------------------------------------------


class TestOnAGpu:
    pytestmark = [
        pytest.mark.gpu,
        needs_native,
        pytest.mark.skipif(
            not (torch.cuda.is_available() and triton.availability()[0]),
            reason=f"needs a GPU: {triton.availability()[1]}",
        ),
    ]

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_low_rank(self, dtype):
        shapes = ((300, 517), (64, 1024), (3, 5, 40), (1000, 8), (77,), (1, 3000))
        host = [weights(torch.Size(s).numel(), dtype, i).view(s) for i, s in enumerate(shapes)]
        device = [w.cuda() for w in host]
        for distribution in ("lowrank", "lowrank:4"):
            ends = []
            for backend, tensors in (("native", host), ("triton", device)):
                plan = Plan(tensors)
                kind = {"distribution": distribution, "backend": backend}
                perturb_(plan, states(1)[0], 1e-3, rounding="stochastic", **kind)
                for count in (1, 10):
                    update_(plan, states(count), *coefficients(count, True), lr=1e-3,
                            restore=1e-3, rounding="stochastic", **kind)  # fmt: skip
                _, v = moments(plan, states(3), *coefficients(3, True), **kind)
                ends.append([*tensors, *v])
            for i, (expected, got) in enumerate(zip(*ends, strict=True)):
                assert_same_bits(got.cpu(), expected, (distribution, i))

    @pytest.mark.parametrize("distribution", ["exact", "rademacher"])
    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_products(self, dtype, distribution):
        a, b = PhiloxState(5, 7), PhiloxState(2**63 + 5, 2**32 - 1)
        for rows, out, inner in ((2, 100, 64), (40, 300, 132), (600, 65, 259)):
            x, weight, bias = inputs(rows, out, inner, dtype)
            on_device = (t.cuda() for t in (x, weight, bias))
            x_there, weight_there, bias_there = on_device
            got = perturbed_linear(x_there, weight_there, [a, b], [0.05, -0.2], parameter=3,
                                   distribution=distribution, bias=bias_there,
                                   backend="triton")  # fmt: skip
            assert_is_the_product(got.cpu(), x, weight, [a, b], [0.05, -0.2], bias, parameter=3,
                                  distribution=distribution, backend="native")  # fmt: skip


def test_a_gpu_has_low_rank_kernels(monkeypatch):
    """By Triton, also where CUDA's kernels were built without them."""
    from adamezo_kernels.backends import choose, cuda

    gpu = [torch.device("cuda:0")]
    monkeypatch.setattr(triton, "supports", lambda device: device.type == "cuda")
    monkeypatch.setattr(triton, "availability", lambda: (True, "said so"))
    monkeypatch.setattr(cuda, "availability", lambda: (True, "said so"))
    monkeypatch.setattr(cuda, "DISTRIBUTIONS", ("exact", "fast", "rademacher"))
    assert choose(gpu, distribution="lowrank:2") is triton
    monkeypatch.setattr(triton, "availability", lambda: (False, "said so"))
    assert choose(gpu, distribution="lowrank:2") is reference
