"""The benchmarks' own arithmetic: rows, quantiles, the gate, the baselines. Nothing is timed."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace

import pytest
import torch

from adamezo_kernels import ops
from benchmarks import gate as gate_module
from benchmarks import kernels, report, rows, tables
from benchmarks.library_calls import (
    AsReleased,
    Fair,
    LibraryOptimizer,
    Plain,
    coefficients,
)
from benchmarks.rows import Row, Variant

ROW = Row(
    benchmark="kernels",
    what="update",
    variant="native",
    type="bfloat16",
    elements=10_000_000,
    horizon=10,
    isa="avx512",
    median_s=0.0625,
    q20_s=0.0615,
    q80_s=0.064,
    repeats=7,
    reference="torch",
    ratio=6.75,
    elements_per_s=1.6e8,
    normals_per_s=1.6e9,
    bytes_per_s=6.4e8,
    device='A "quoted", name, 2 cores',
    clock_hz=3.5e9,
    command="python -m benchmarks.kernels",
)


# Rows --------------------------------------------------------------------------------------------


def test_rows_survive_the_csv(tmp_path):
    other = Row(benchmark="step", what="AdaMeZO peak", variant="ours", peak_bytes=2**31, ratio=1.01)
    rows.write_rows(tmp_path / "new" / "r.csv", [ROW, other])
    assert rows.read_rows(tmp_path / "new" / "r.csv") == [ROW, other]


def test_a_csv_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "r.csv"
    rows.write_rows(path, [ROW])
    header, line = list(csv.reader(path.open()))
    path.write_text(",".join(header[1:]) + "\n" + ",".join(line[1:]) + "\n")
    with pytest.raises(ValueError, match="run the benchmark again"):
        rows.read_rows(path)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantiles_are_torchs(count, q):
    values = [float((7 * i) % 11) for i in range(count)]
    expected = torch.tensor(values, dtype=torch.float64).quantile(q).item()
    assert rows.quantile(values, q) == pytest.approx(expected, rel=1e-12)  # float64 rounding


def test_quantile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        rows.quantile([], 0.5)


def test_fit_finds_an_exact_line():
    x = [1.0, 5.0, 10.0, 20.0, 50.0]
    slope, intercept, r2 = rows.linear_fit(x, [0.25 * v + 3 for v in x])
    assert (slope, intercept, r2) == pytest.approx((0.25, 3.0, 1.0), rel=1e-12)
    assert rows.linear_fit(x, [v**2 for v in x])[2] < 0.99


def test_variants_are_timed_in_turn_with_their_threads():
    seen = []
    before = torch.get_num_threads()
    variants = [
        Variant(name, lambda name=name: seen.append((name, torch.get_num_threads())), threads)
        for name, threads in (("a", 1), ("b", 2))
    ]
    rows.interleave(variants, repeats=3, sample_s=0.0)
    rounds = seen[-6:]
    assert [name for name, _ in rounds] == ["a", "b"] * 3
    assert all(threads == {"a": 1, "b": 2}[name] for name, threads in seen)
    assert [len(v.seconds) for v in variants] == [3, 3]
    assert torch.get_num_threads() == before


# The gate ----------------------------------------------------------------------------------------


def test_gate_lets_equal_bits_pass():
    gate_module.gate([torch.bfloat16], backend="reference")


@pytest.mark.parametrize("operation", ["sample_", "perturb_", "update_"])
def test_gate_refuses_one_wrong_bit(monkeypatch, operation):
    right = {name: getattr(ops, name) for name in ("sample_", "perturb_", "update_")}

    def wrong(target, *arguments, backend, **options):
        right[operation](target, *arguments, backend="reference", **options)
        if backend == "wrong":
            first = target if isinstance(target, torch.Tensor) else next(iter(target)).tensor
            first.view(torch.int32)[0] ^= 1

    for name, f in right.items():
        monkeypatch.setattr(
            ops, name, lambda *a, backend, f=f, **o: f(*a, backend="reference", **o)
        )
    monkeypatch.setattr(ops, operation, wrong)
    with pytest.raises(gate_module.GateError, match=f"{operation}.*elements differ"):
        gate_module.gate([torch.float32], backend="wrong")


# The baselines -----------------------------------------------------------------------------------


def transcription(weights, seeds_and_grads, *, lr, eps, betas, weight_decay=0.0):
    """The paper's formulas in float64 on the directions that torch's generator gives."""
    beta1, beta2 = betas
    m = [torch.zeros_like(w) for w in weights]
    v = [torch.zeros_like(w) for w in weights]
    for age, (seed, p) in enumerate(seeds_and_grads):
        generator = torch.Generator().manual_seed(seed)
        for i, w in enumerate(weights):
            z = torch.normal(0.0, 1.0, w.shape, generator=generator).double()
            m[i] += (1 - beta1) * beta1**age * p * z
            v[i] += (1 - beta2) * beta2**age * p**2 * z**2
    root = [x.sqrt() + eps if beta2 else torch.ones_like(x) for x in v]
    return [
        w * (1 - lr * weight_decay) - lr * a / b for w, a, b in zip(weights, m, root, strict=True)
    ]


@pytest.mark.parametrize("operations", [Fair, Plain, AsReleased])
@pytest.mark.parametrize(("betas", "horizon"), [((0.7, 0.9), 3), ((0.0, 0.0), 1), ((0.5, 0.0), 2)])
def test_library_calls_agree_with_a_float64_transcription(operations, betas, horizon):
    torch.manual_seed(0)
    start = [torch.randn(5, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    weights = [w.float().requires_grad_() for w in start]
    inputs = torch.randn(11, 7)

    def closure():
        return (torch.tanh(inputs @ weights[0].T) ** 2).mean() + (weights[1] ** 2).sum()

    zo_eps, lr, eps, decay = 1e-3, 0.05, 1e-8, 0.1
    optimizer = LibraryOptimizer(
        operations(weights),
        lr=lr,
        betas=betas,
        eps=eps,
        zo_eps=zo_eps,
        horizon=horizon,
        weight_decay=decay,
        seed=5,
    )
    expected = [w.float().double() for w in start]
    for step in range(5):
        losses = []

        def noted(losses=losses):
            losses.append(closure())
            return losses[-1]

        mean = optimizer.step(noted)
        above, below = (loss.item() for loss in losses)
        assert mean == (above + below) / 2
        assert optimizer.history[0] == (5 + step, (above - below) / (2 * zo_eps))
        assert len(optimizer.history) == min(step + 1, horizon)
        expected = transcription(
            expected, optimizer.history, lr=lr, eps=eps, betas=betas, weight_decay=decay
        )
    for got, want in zip(weights, expected, strict=True):
        # Weights of order 1 in float32, rounded at most 5 times in each of 5 steps (perturbing,
        # restoring, updating): 25 half units in the last place of numbers below 4.
        assert (got.detach() - want).abs().max() <= 25 * 2**-23


def test_the_fair_way_perturbs_16_bit_weights_along_the_same_direction():
    weights = torch.zeros(1000, dtype=torch.bfloat16)
    Fair([weights]).perturb_(3, 1.0)
    z = torch.empty(1000).normal_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(weights, z.bfloat16())


def test_the_fair_way_sums_in_float32_whatever_the_weights():
    # In bfloat16 a sum of 50 equal terms of 1 / 50 of the first would not move.
    weights = torch.zeros(64, dtype=torch.bfloat16)
    Fair([weights]).update_([1] * 50, [1.0] + [1 / 1024] * 49, None, lr=-1.0)
    z = torch.empty(64).normal_(generator=torch.Generator().manual_seed(1))
    expected = (z.double() * (1 + 49 / 1024)).bfloat16()
    # One unit in the last place, where float32 sums and the exact ones round to two neighbours.
    assert ((weights - expected).abs() <= expected.abs() * 2**-7).all()


def test_coefficients_are_the_papers():
    first, second = coefficients([2.0, -3.0], (0.7, 0.9))
    assert first == pytest.approx([0.3 * 2, 0.3 * 0.7 * -3], rel=1e-12)
    assert second == pytest.approx([0.1 * 4, 0.1 * 0.9 * 9], rel=1e-12)
    assert coefficients([2.0], (0.0, 0.0)) == ([2.0], None)


# The grid, the tables, the report ----------------------------------------------------------------


def test_the_grid_holds_every_case_that_was_asked_for():
    grid = list(kernels.cases(["avx512", "avx2", "portable"], 2, quick=False))
    assert {c.elements for c in grid} == {10**n for n in range(4, 9)}
    wanted = itertools.product(kernels.TYPES, kernels.HORIZONS)
    assert {(c.type, c.horizon) for c in grid if c.what == "update"} == set(wanted)
    for case in grid:
        names = {name for name, _, _ in case.columns}
        assert "native" in names
        assert len(set(case.columns)) == len(case.columns)


def test_rates_and_ratios_of_a_case():
    case = kernels.Case("update", "bfloat16", 1000, 10, ())
    timed = [
        Variant("torch", print, seconds=[4.0]),
        Variant("native", print, seconds=[0.5, 0.25, 1]),
    ]
    base, native = kernels.rows_of(case, timed, {"clock_hz": 1e6})
    assert (base.ratio, native.ratio) == (1.0, 8.0)
    assert native.elements_per_s == 2000
    assert native.normals_per_s == 20_000
    assert native.bytes_per_s == 1000 * 2 * 2 / 0.5
    assert native.cycles_per_normal == 50
    assert (native.q20_s, native.q80_s) == pytest.approx((0.35, 0.8))


def test_a_table_is_rewritten_and_only_it():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb"
    new = tables.rewrite(text, {"one": "new"})
    assert new == "a\n<!-- one -->\nnew\n<!-- /one -->\nb"
    assert tables.rewrite(new, {"one": "new"}) == new
    with pytest.raises(ValueError, match="two -->"):
        tables.rewrite(text, {"two": "x"})


def test_tables_show_what_the_rows_say():
    base = replace(
        ROW, variant="torch", isa="", median_s=0.421875, ratio=1.0, elements_per_s=2.37e7
    )
    made = tables.blocks([ROW, base])
    assert "| update H = 10, bfloat16 | 10,000,000 | 23.7 |  |  | 160 (6.8x) |" in made["kernels"]
    assert "3.50 GHz" in made["conditions"]
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    assert tables.rewrite(tables.rewrite(text, made), made) == tables.rewrite(text, made)


def test_the_report_says_plainly_what_is_not_met():
    base = replace(ROW, variant="torch", isa="", median_s=6.8 * (ROW.median_s or 0.0))
    verdicts = {name: verdict for name, _, _, verdict in report.judged([ROW, base])}
    wanted = "update bfloat16 H = 10, AVX-512, one thread, over torch at its fastest"
    assert verdicts.pop(wanted) == "NOT MET"
    assert set(verdicts.values()) == {"not measured"}
    slower = replace(base, median_s=10.1 * (ROW.median_s or 0.0))
    met = {name: verdict for name, _, _, verdict in report.judged([ROW, slower])}
    assert met[wanted] == "met"


def test_optimizer_share_of_a_step():
    parts = {"forwards": 3.0, "perturbation": 0.4, "update": 0.6}
    some = [
        Row(
            benchmark="step",
            what=f"AdaMeZO {part}",
            variant="ours",
            horizon=10,
            tokens="16x32",
            median_s=seconds,
        )
        for part, seconds in parts.items()
    ]
    verdicts = {name: rest for name, *rest in report.judged(some)}
    assert verdicts["optimizer's share of an AdaMeZO step, 16 x 32"] == [
        "at most 30.0%",
        "25.0%",
        "met",
    ]
