"""The Triton backend: what is said where it cannot run, when it is chosen, and its bits: in the
interpreter, in a process of its own, and on a GPU."""

from __future__ import annotations

import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from adamezo_kernels import (
    RULES,
    PhiloxState,
    Plan,
    moments,
    perturb_,
    sample_,
    update_,
    update_terms_,
)
from adamezo_kernels.backends import choose, cuda, reference, triton
from helpers.backends import needs_native
from helpers.interpreted import ROOT, in_a_process, installed, needs_triton
from helpers.operations import (
    KEY,
    OFFSET,
    TYPES,
    assert_same_bits,
    coefficients,
    states,
    unguarded,
    weights,
)
from helpers.rules import EPS, NUMBERS, RESTORE, filled, terms_of

HERE = Path(__file__).parent
GPU, CPU = [torch.device("cuda:0")], [torch.device("cpu")]


# --- the interpreter ----------------------------------------------------------------------------


@pytest.mark.slow
@needs_triton
def test_the_interpreter_gives_the_bits_of_the_cpu():
    """Every test of triton_interpreted.py passes; or this Triton is too old for it, and says so."""
    done = in_a_process(
        *("-m", "pytest", "-p", "no:cacheprovider", "-q", str(HERE / "triton_interpreted.py")),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout
    if installed() < (3, 9):
        assert "rounds an fma twice" in done.stdout
        assert "passed" not in done.stdout
        pytest.skip(f"the interpreter of Triton {installed()} rounds an fma twice")
    assert re.search(r"\n\d\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout


# --- what is said where it cannot run -----------------------------------------------------------


def said(monkeypatch, found: types.ModuleType | None) -> str:
    monkeypatch.setitem(sys.modules, "triton", found)
    able, reason = triton.availability.__wrapped__()
    assert not able
    return reason


def test_no_triton_is_said(monkeypatch):
    assert "there is no Triton here" in said(monkeypatch, None)
    assert "pip install triton" in said(monkeypatch, None)


def test_an_old_triton_is_said(monkeypatch):
    old = types.ModuleType("triton")
    old.__version__ = "3.3.1"
    assert "Triton 3.3.1 is older than 3.4" in said(monkeypatch, old)


@pytest.mark.parametrize(
    "text",
    [
        "raise ImportError('libtriton.so: undefined symbol')",
        "raise RuntimeError('libtriton.so: undefined symbol')",
        "__version__ = 'main'",
        "__version__ = '3.9.0'",  # and nothing else
    ],
)
def test_a_broken_triton_is_reported_and_not_fatal(tmp_path, text):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(text)
    paths = [str(tmp_path), str(ROOT), str(ROOT / "python_api")]
    done = in_a_process("-m", "adamezo_kernels", PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 0, done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("triton "))
    assert re.search(r"no +Triton cannot be imported \(\w+: .+\): install", line), line
    if "symbol" in text:
        assert "undefined symbol" in line


def test_a_machine_without_a_gpu_is_said(monkeypatch):
    if installed() is None or torch.cuda.is_available() or triton.INTERPRETED:
        pytest.skip("needs a Triton and no GPU")
    able, reason = triton.availability()
    assert not able
    assert "finds no GPU" in reason
    with pytest.raises(RuntimeError, match="backend 'triton' is not available.*finds no GPU"):
        perturb_(Plan([torch.zeros(3)]), PhiloxState(0, 0), 1.0, backend="triton")
    monkeypatch.setenv("ADAMEZO_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available.*finds no GPU"):
        perturb_(Plan([torch.zeros(3)]), PhiloxState(0, 0), 1.0)


@needs_triton
def test_a_compiler_that_fuses_and_a_driver_that_fails_are_said(monkeypatch):
    from triton.runtime import driver

    class Driver:
        def get_current_target(self):
            return types.SimpleNamespace(backend="cuda", arch=90)

    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "kernels", lambda: None)
    before = dict(vars(driver))
    driver.set_active(Driver())
    try:
        monkeypatch.setattr(triton, "can_fuse", lambda target: True)
        able, reason = triton.availability.__wrapped__()
        assert not able
        assert "fuses multiplications and additions for cuda whatever" in reason
        monkeypatch.setattr(triton, "can_fuse", lambda target: False)
        assert triton.availability.__wrapped__() == (True, f"Triton {_version()} for cuda:90")
        monkeypatch.delattr(Driver, "get_current_target")
        able, reason = triton.availability.__wrapped__()
        assert not able
        assert "no working driver (AttributeError" in reason
    finally:
        vars(driver).clear()
        vars(driver).update(before)


def _version() -> str:
    import triton as found

    return found.__version__


def test_triton_is_not_imported_before_it_is_needed():
    """Nor for tensors on a CPU."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from adamezo_kernels import PhiloxState, Plan, perturb_\n"
        "import adamezo\n"
        "perturb_(Plan([torch.zeros(3)]), PhiloxState(0, 0), 1.0)\n"
        "print([name for name in set(sys.modules) - before if name.split('.')[0] == 'triton'])"
    )
    done = in_a_process("-c", code)
    assert done.stdout.strip() == "[]", done.stdout


# --- the choice ---------------------------------------------------------------------------------


def test_the_choice_on_a_gpu(monkeypatch):
    """The CUDA kernels where they were built, else Triton, else the reference; on a CPU neither."""

    def able(backend, yes):
        monkeypatch.setattr(backend, "availability", lambda: (yes, "said so"))

    monkeypatch.setattr(triton, "supports", lambda device: device.type == "cuda")
    able(cuda, True)
    able(triton, True)
    assert choose(GPU) is cuda
    assert choose(GPU, "triton") is triton
    assert choose(CPU) is not triton
    able(cuda, False)
    assert choose(GPU) is triton
    assert choose(GPU, distribution="rademacher") is triton
    with pytest.raises(RuntimeError, match="'triton' does not support tensors on cpu"):
        choose(CPU, "triton")
    able(triton, False)
    assert choose(GPU) is reference
    with pytest.raises(RuntimeError, match="triton has exact.*and cannot run: said so"):
        choose(GPU, distribution="fast")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: said so"):
        choose(GPU, "triton")


def test_fast_is_for_nvidia(monkeypatch):
    assert triton.distributions(None) == ("exact", "fast", "rademacher", "lowrank")
    assert triton.distributions("6.4") == ("exact", "rademacher", "lowrank")
    monkeypatch.setattr(triton, "DISTRIBUTIONS", triton.distributions("6.4"))
    monkeypatch.setattr(triton, "availability", lambda: (True, ""))
    with pytest.raises(RuntimeError, match="'triton' has no distribution 'fast'"):
        choose(GPU, "triton", "fast")


# --- on a GPU: `make gpu-check` -----------------------------------------------------------------

on_a_gpu = [
    pytest.mark.gpu,
    needs_native,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and triton.availability()[0]),
        reason=f"needs a GPU: {triton.availability()[1]}",
    ),
]
GPU_BACKENDS = ["triton"] + (
    ["cuda"] if torch.cuda.is_available() and cuda.availability()[0] else []
)


def on_every_device(operation, tensors: list[torch.Tensor], expected_by: str = "native") -> None:
    """``operation(plan, backend)`` by Triton, CUDA where it is, and the CPU: bit for bit."""
    expected = [t.clone() for t in tensors]
    expected_more = operation(Plan(expected), expected_by) or []
    for backend in GPU_BACKENDS:
        device = [on_device(t) for t in tensors]
        more = operation(Plan(device), backend) or []
        for i, (a, b) in enumerate(zip([*device, *more], [*expected, *expected_more], strict=True)):
            assert_same_bits(a.cpu(), b, (backend, i))


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """With the strides and the alignment that it has."""
    offset = tensor.storage_offset()
    storage = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size() + 8)
    there = storage.to(tensor.dtype).cuda()
    return there.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def gpu_tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    sizes = (0, 1, 3, 2047, 4097, 70001, 2**20 + 3)
    made = [weights(n + 8, dtype, n)[i % 8 : i % 8 + n] for i, n in enumerate(sizes)]
    staged = weights(1100 * 1000, dtype, 1).view(1000, 1100).t()
    return [*made, weights(300 * 517, dtype, 0).view(300, 517)[:, 5:505], staged]


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_exact(self, dtype):
        for offset in (0, OFFSET, 2**34 - 700):
            on_every_device(
                lambda plan, backend, offset=offset: perturb_(
                    plan, PhiloxState(KEY, 9, offset), -1.7e-3, backend=backend
                ),
                gpu_tensors(dtype),
            )
        for count in (1, 2, 10, 33):
            for second in (True, False):
                sums = coefficients(count, second)
                on_every_device(
                    lambda plan, backend, sums=sums, count=count: update_(
                        plan,
                        states(count),
                        *sums,
                        lr=3e-3,
                        weight_decay=0.1,
                        restore=1e-3,
                        backend=backend,
                    ),
                    gpu_tensors(dtype),
                )
        on_every_device(
            lambda plan, backend: sum(
                moments(plan, states(3), *coefficients(3, True), backend=backend), []
            ),
            gpu_tensors(dtype),
        )

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    @pytest.mark.parametrize(
        "kind", [("exact", "stochastic"), ("rademacher", "nearest"), ("rademacher", "stochastic")]
    )
    def test_the_other_kinds(self, dtype, kind):
        distribution, rounding = kind
        options = {"distribution": distribution, "rounding": rounding}

        def operation(plan, backend):
            perturb_(plan, states(1)[0], 1e-3, backend=backend, **options)
            update_(plan, states(5), *coefficients(5, True), lr=1e-3, backend=backend, **options)

        on_every_device(operation, gpu_tensors(dtype), "reference")

    @pytest.mark.parametrize("kept_type", TYPES, ids=str)
    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    @pytest.mark.parametrize("rule", NUMBERS)
    def test_rules(self, rule, dtype, kept_type):
        for distribution, rounding in (("exact", "stochastic"), ("rademacher", "nearest")):
            options = {"distribution": distribution, "rounding": rounding}

            def operation(plan, backend, options=options):
                buffers = [
                    [
                        filled(rule, i, like, 2 * k + i, unguarded).to(segment.tensor.device)
                        for i in range(RULES[rule].buffers)
                    ]
                    for k, segment in enumerate(plan)
                    for like in [torch.empty(segment.tensor.shape, dtype=kept_type, device="meta")]
                ]
                plan, terms = plan.with_buffers(buffers), terms_of(rule)
                perturb_(plan, terms, -RESTORE, backend=backend, **options)
                if RULES[rule].updates:
                    update_terms_(plan, terms, eps=EPS, restore=RESTORE, backend=backend, **options)
                return [buffer.cpu() for kept in buffers for buffer in kept]

            on_every_device(operation, gpu_tensors(dtype))

    def test_subnormal_sums_and_quotients(self):
        for scale in (1e-38, 1e-42):
            sums = [scale, -scale], [scale, scale]

            def operation(plan, backend, sums=sums):
                update_(plan, states(2), *sums, lr=1.0, eps=1e3, backend=backend)
                return sum(moments(plan, states(2), *sums, backend=backend), [])

            on_every_device(operation, [torch.zeros(5000)])

    def test_out_of_place(self):
        source = [w.cuda() for w in gpu_tensors(torch.bfloat16)]
        for backend in GPU_BACKENDS:
            out = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in source]
            perturb_(Plan(source).into(out), PhiloxState(KEY, 9), 1e-2, backend=backend)
            for w, got in zip(source, out, strict=True):
                expected = w.cpu().clone()
                i = next(i for i, other in enumerate(source) if other is w)
                plan = Plan([expected], parameters=[i])
                perturb_(plan, PhiloxState(KEY, 9), 1e-2, backend="native")
                assert_same_bits(got.cpu(), expected, i)

    def test_more_elements_than_int32_counts(self):
        numel = 2**31 + 1027
        if torch.cuda.mem_get_info()[0] < 2.5 * numel:
            pytest.skip("needs 5 GB of free device memory")
        w = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
        perturb_(Plan([w]), PhiloxState(KEY, 9), 1.0, backend="triton")
        for start in (0, 2**31 - 512, 2**31, numel - 700):
            expected = torch.zeros(min(1500, numel - start), dtype=torch.bfloat16)
            perturb_(Plan([expected]), PhiloxState(KEY, 9, start), 1.0, backend="native")
            assert_same_bits(w[start : start + len(expected)].cpu(), expected, start)

    def test_fast_normals_are_near_the_exact_ones(self):
        """By the bound of test_cuda_gpu.py: the instructions are the same."""
        if "fast" not in triton.DISTRIBUTIONS:
            pytest.skip("fast directions are for NVIDIA")
        z, exact = (
            sample_(
                torch.empty(1 << 24, device="cuda"),
                PhiloxState(KEY, 3),
                distribution=distribution,
                backend="triton",
            )
            .double()
            .view(-1, 2)
            for distribution in ("fast", "exact")
        )
        assert z.isfinite().all()
        square = exact.square().sum(1, keepdim=True)
        off_square = 1.3863 * 2.0**-22 * torch.clamp(square / 1.3863, min=1.0)
        radius = square.sqrt()
        off_radius = torch.minimum(off_square.sqrt(), off_square / radius.clamp(min=1e-30))
        bound = off_radius + radius * (2.0**-22 + 2.0**-20.5 + 2.0**-22) + 2e-6
        assert ((z - exact).abs() <= bound).all()

    def test_a_side_stream_is_kept_to(self):
        host = weights(1 << 20, torch.float32, 0)
        side = torch.cuda.Stream()
        device = torch.zeros(1 << 20, device="cuda")
        source = host.cuda()
        sums = coefficients(3, True)
        update_(Plan([device]), states(3), *sums, lr=0.0, backend="triton")  # compiles
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(500_000_000)
            device.copy_(source)
            update_(Plan([device]), states(3), *sums, lr=3e-3, backend="triton")
            assert not side.query(), "the call waited for the device"
        side.synchronize()
        update_(Plan([host]), states(3), *sums, lr=3e-3, backend="native")
        assert_same_bits(device.cpu(), host)
