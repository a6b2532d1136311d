"""The benchmarks' own arithmetic: rows, quantiles, the gate, the baselines. Nothing is timed."""

from __future__ import annotations

import csv
import itertools
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_native

from adamezo import AdaMeZO
from adamezo.methods import history
from adamezo_kernels import PhiloxState, ops
from benchmarks import gate as gate_module
from benchmarks import (
    horizon,
    kernels,
    method_costs,
    methods,
    paper,
    plots,
    report,
    rows,
    step,
    tables,
)
from benchmarks.library_calls import (
    AsReleased,
    Fair,
    LibraryOptimizer,
    Plain,
    StoredHessian,
    coefficients,
)
from benchmarks.rows import Row, Variant
from benchmarks.step import ADAMEZO, ADAMEZO_20, BARE, EXACT, MEZO, RELEASED, Job, Method

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
    for count in range(5):
        losses = []

        def noted(losses=losses):
            losses.append(closure())
            return losses[-1]

        mean = optimizer.step(noted)
        above, below = (loss.item() for loss in losses)
        assert mean == (above + below) / 2
        assert optimizer.history[0] == (5 + count, (above - below) / (2 * zo_eps))
        assert len(optimizer.history) == min(count + 1, horizon)
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


def test_the_stored_hessian_agrees_with_a_float64_transcription():
    torch.manual_seed(0)
    start = torch.randn(5, 7)
    weights = start.clone().requires_grad_()
    inputs = torch.randn(11, 7)
    losses = []

    def closure():
        losses.append((torch.tanh(inputs @ weights.T) ** 2).mean())
        return losses[-1]

    # A smoothing at which the diagonal moves; as published (1e-8) it would show in no bit here.
    mu, lr, a = 1e-2, 0.05, 0.1
    optimizer = StoredHessian([weights], lr=lr, zo_eps=mu, smoothing=a, seed=5)
    theta, d = start.double(), torch.ones(5, 7, dtype=torch.float64)
    for count in range(4):
        losses.clear()
        assert optimizer.step(closure) == losses[0].item()
        at, above, below = (loss.item() for loss in losses)
        z = torch.normal(0.0, 1.0, (5, 7), generator=torch.Generator().manual_seed(5 + count))
        z = z.double()
        curvature = abs(above + below - 2 * at) / (2 * mu**2)
        d = (1 - a) * d + a * curvature * d * z**2
        theta = theta - lr * (above - below) / (2 * mu) * z / d.sqrt()
    # Weights of order 1, rounded four times a step, and a step's own float32 factors.
    assert (weights.detach() - theta).abs().max() <= 4 * 4 * 2**-23
    assert (optimizer.diagonals[0] - d).abs().max() <= 4 * 4 * 2**-23 * d.max()


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
    made = tables.performance_blocks([ROW, base])
    assert "| update H = 10, bfloat16 | 10,000,000 | 23.7 |  |  | 160 (6.8x) |" in made["kernels"]
    assert "3.50 GHz" in made["conditions"]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_every_block_has_its_place_in_its_page(page):
    made = tables.PAGES[page](tables.load())
    text = page.read_text(encoding="utf-8")
    assert tables.rewrite(tables.rewrite(text, made), made) == tables.rewrite(text, made)
    assert text.count("<!-- /") == len(made)


def test_what_was_not_measured_on_a_gpu_is_said():
    assert "has not been measured on a GPU" in tables.paper_blocks([])["paper_gpu"]
    assert "has not been measured on a GPU" in tables.horizon_blocks([])["horizon_gpu"]


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


# Steps -------------------------------------------------------------------------------------------

TOY = Job("paper", "OPT-tiny", "bfloat16", 8, batch=2)


@pytest.fixture
def toy():
    pytest.importorskip("transformers")
    return TOY


@needs_native
def test_the_papers_benchmark_runs_from_end_to_end_without_a_gpu(toy, tmp_path, capsys):
    jobs = [toy, replace(toy, type="float16")]
    output = tmp_path / "paper_gpu.csv"

    def plan(job, quick):
        return dict.fromkeys(paper.METHODS, 2)

    def peaks(job, quick):
        return [ADAMEZO] if job == toy else []

    made = step.run(jobs, plan, peaks, {"device": "toy"}, output, False)
    assert rows.read_rows(output) == [replace(r, **_six_digits(r)) for r in made]
    left_out = {line for line in capsys.readouterr().out.splitlines() if "left out" in line}
    timed = {(r.what, r.variant, r.horizon) for r in made if r.what.endswith(" step")}
    able = [m for m in paper.METHODS if not m.missing("cpu")]
    assert timed == {(f"{m.method} step", m.variant, m.horizon) for m in able}
    assert len(left_out) == len(paper.METHODS) - len(able)
    assert {"MeZO", "AdaMeZO", "HiZOO", "AdamW", "bare"} == {m.method for m in able}
    assert all(
        r.repeats == 2 and r.median_s is not None
        for r in made
        if "peak" not in r.what[-4:] and r.what != "largest module"
    )
    bare, ours = (r.peak_bytes for r in made if r.what.endswith(" peak"))
    assert bare > 0
    assert ours > 0
    # The positions, of which OPT has two more than are used: bfloat16 and float16 rows of 32.
    assert {r.peak_bytes for r in made if r.what == "largest module"} == {2050 * 32 * 2}

    blocks = tables.paper_blocks(made)
    assert "one toy" in blocks["paper_gpu"]
    assert "AdaMeZO H = 10, ours | 2x8 bfloat16" in blocks["paper_split"]
    plots.plot_paper(tmp_path)
    assert (tmp_path / "paper.png").stat().st_size > 10_000


def _six_digits(row):
    values = {f: getattr(row, f) for f in ("median_s", "q20_s", "q80_s", "ratio")}
    return {f: None if v is None else float(f"{v:.6g}") for f, v in values.items()}


@needs_native
def test_a_method_is_put_where_its_history_is_full(toy, monkeypatch):
    """The step that is timed sums over as many directions as its horizon says."""
    made, backends = [], []

    class Noted(AdaMeZO):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    def closure():
        backends.append(os.environ["ADAMEZO_BACKEND"])
        return toy.closure(model)()

    monkeypatch.setattr(step, "AdaMeZO", Noted)
    monkeypatch.delenv("ADAMEZO_BACKEND", raising=False)
    model = toy.load()
    for method in (MEZO, ADAMEZO, ADAMEZO_20):
        method.make(model)(closure)
        (group,) = made[-1].param_groups
        newest = method.horizon
        assert list(group["directions"]) == list(range(newest, newest - method.horizon, -1))
        assert len(group["projected_grads"]) == method.horizon
        assert 0 not in group["projected_grads"][1:]
    assert set(backends) == {"native"}
    assert "ADAMEZO_BACKEND" not in os.environ


def test_weights_are_back_at_their_addresses_after_the_released_way(toy, monkeypatch):
    models = []
    load = Job.load
    monkeypatch.setattr(Job, "load", lambda job: models.append(load(job)) or models[-1])
    addresses = []

    def bare(closure):
        addresses.append([p.data_ptr() for p in models[-1].parameters()])
        return step.two_forwards(closure)

    make = Method.make
    monkeypatch.setattr(Method, "make", lambda m, *rest: bare if m == BARE else make(m, *rest))
    step.measure(toy, {BARE: 3, RELEASED[ADAMEZO]: 3}, {})
    assert all(some == addresses[0] for some in addresses)


def test_what_does_not_fit_into_memory_has_rows_that_say_so(toy, monkeypatch):
    def too_much(closure):
        raise torch.OutOfMemoryError("toy")

    make = Method.make
    monkeypatch.setattr(
        Method, "make", lambda m, *rest: too_much if m == step.ADAMW else make(m, *rest)
    )
    made = step.measure(toy, {BARE: 2, step.ADAMW: 2}, {})
    whole = {r.what: r for r in made if r.what.endswith(" step")}
    assert whole["AdamW step"].median_s is None
    assert whole["AdamW step"].repeats == 0
    assert whole["bare step"].repeats == 2
    assert "did not fit" in tables.step_block(made, "paper")


@pytest.mark.parametrize(
    ("times", "value", "message"),
    [(1, 1.0, "1 times, expected 2"), (2, float("nan"), "was not a step")],
)
def test_a_step_that_was_none_is_not_timed(times, value, message):
    def some(closure):
        return sum(closure() for _ in range(times))

    split = step.Split(MEZO, some, lambda: torch.tensor(value), "cpu")
    with pytest.raises(RuntimeError, match=message):
        split.once()


def test_a_step_is_split_where_its_closure_begins_and_ends(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(clock))
    split = step.Split(MEZO, step.two_forwards, lambda: torch.tensor(1.0), "cpu")
    split.once()
    assert split.seconds == {"perturbation": [1 + 4], "forwards": [2 + 8], "update": [16]}
    assert split.total == [31.0]


def test_no_speed_on_a_device_whose_bits_differ(monkeypatch):
    paper.check_bits("cpu", ["reference"])
    right = ops.perturb_

    def wrong(plan, *arguments, **options):
        right(plan, *arguments, **options)
        calls.append(plan)
        if len(calls) == 1:
            next(iter(plan)).tensor.view(torch.int16)[7] ^= 256

    calls = []
    monkeypatch.setattr(paper, "perturb_", wrong)
    with pytest.raises(gate_module.GateError, match="1 weights differ"):
        paper.check_bits("cpu", ["reference"])


def _timed(method, part, tokens, kind="bfloat16", benchmark="paper", **columns):
    what = f"{method.method} {part}"
    return Row(
        benchmark, what, method.variant, kind, horizon=method.horizon, tokens=tokens, **columns
    )


def test_of_several_jobs_the_worst_is_judged():
    made = [
        _timed(ADAMEZO, "step", "16x64", median_s=0.9),
        _timed(RELEASED[MEZO], "step", "16x64", median_s=1.0),
        _timed(ADAMEZO, "step", "16x256", median_s=0.95),
        _timed(RELEASED[MEZO], "step", "16x256", median_s=1.0),
        _timed(BARE, "step", "16x256", median_s=0.8),
        _timed(ADAMEZO, "peak", "16x256", peak_bytes=1004),
        _timed(MEZO, "peak", "16x256", peak_bytes=1000),
    ]
    found = {name: rest for name, *rest in report.judged(made, report.PAPER)}
    name = "GPU: an AdaMeZO step over a MeZO step as released"
    assert found[name] == ["at most 0.9x", "0.95x", "NOT MET"]
    assert found["GPU, 16 x 256: over two bare forwards"][1:] == ["1.1875x", "met"]
    name = "GPU: peak memory of an AdaMeZO step over our MeZO step's"
    assert found[name][1:] == ["1.004x", "met"]
    assert found["CPU, 16 x 32: over two bare forwards"][1] == "not measured"


def test_what_exact_perturbation_may_cost():
    columns = dict(tokens="16x32", kind="float32", benchmark="step")
    made = [
        _timed(ADAMEZO, "step", median_s=1.0, **columns),
        _timed(EXACT, "step", median_s=1.1, **columns),
        _timed(ADAMEZO, "peak", peak_bytes=1000, **columns),
        _timed(EXACT, "peak", peak_bytes=1150, **columns),
        Row("step", "largest module", "weights", tokens="16x32", peak_bytes=100),
    ]
    found = {name: rest for name, *rest in report.judged(made)}
    assert found["a step with exact perturbation over one in place, 16 x 32"][1:] == ["1.1x", "met"]
    name = "its additional memory over the largest module's weights"
    assert found[name][1:] == ["1.5x", "NOT MET"]


# The horizon -------------------------------------------------------------------------------------


def test_the_share_kept_is_what_the_coefficients_hold():
    for row in horizon.kept([0.7, 0.99], [1, 10, 64]):
        beta = float(row.variant.split()[-1])
        first, _ = history.coefficients([1.0] * row.horizon, (beta, 0.0), "paper")
        assert row.ratio == pytest.approx(sum(first), rel=1e-12)


@pytest.mark.parametrize("normalization", ["paper", "bias_corrected"])
def test_an_update_vector_is_the_rules(normalization):
    grads, betas = [3.0, -1.0, 0.5, 2.0], (0.7, 0.9)
    u = horizon.update_vectors(grads, betas, 3, 1000)[normalization]
    first, second = history.coefficients([2.0, 0.5, -1.0], betas, normalization)
    m = v = size = 0
    for age, (a, b) in enumerate(zip(first, second, strict=True)):
        z = ops.sample_(torch.empty(1000), PhiloxState(horizon.SEED, 1000 - age)).double()
        m, v, size = m + a * z, v + b * z**2, size + abs(a * z)
    # Two float32 sums of three terms, a root and divisions: at most 16 roundings of 2^-24 each.
    assert ((u - m / (v.sqrt() + 1e-8)).abs() <= 16 * 2**-24 * size / v.sqrt()).all()


def test_a_horizon_as_long_as_the_run_leaves_nothing_out():
    made = list(horizon.distances([[1.0, -2.0, 3.0, 0.5]], (0.7, 0.9), [1, 4, 9], [4], 1000))
    found = {(r.what, r.variant.split(", ")[-1], r.horizon): r.ratio for r in made}
    for h in (4, 9):
        assert found["cosine", "0.9", h] == pytest.approx(1, abs=1e-6)  # a float32 dot product
        assert found["error", "paper", h] == found["error, worst", "bias_corrected", h] == 0
    assert found["cosine", "0.9", 1] < 0.9
    assert found["error", "paper", 1] > 0.1


def test_recorded_runs_are_longer_than_the_longest_horizon():
    assert all(len(run) >= max(horizon.TIMES) for run in horizon.recorded())
    assert min(horizon.TIMES) > max(horizon.HORIZONS)


def test_the_advice_is_the_smallest_horizon_that_is_near_enough():
    betas = horizon.BETAS[0]
    variant = f"betas {betas[0]}, {betas[1]}"
    made = [
        Row("horizon", "cosine", variant, horizon=h, ratio=c)
        for h, c in ((1, 0.5), (5, 0.92), (10, 0.97), (20, 0.98))
    ]
    made += [
        Row("horizon", "AdaMeZO step", "ours", type="float32", horizon=h, median_s=s)
        for h, s in ((1, 2.0), (5, 2.5), (10, 3.0))
    ]
    text = tables.advice_block(made)
    assert f"| {betas[0]}, {betas[1]} | 5 (1.25x) | 10 (1.50x) | above 64 |" in text


# The methods beside each other -------------------------------------------------------------------

ENTRIES = {entry.name: entry for entry in methods.ENTRIES}


class ToyJob:
    """A least squares problem in five weights, with the interface of benchmarks/method_jobs.py."""

    name, budget, batch, rows = "toy", 216, 4, 40

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 5, generator=generator)
        self.y = self.x @ torch.ones(5)
        self.batches = []

    def start(self, mode, seed):
        model = torch.nn.Linear(5, 1, bias=False)
        torch.nn.init.zeros_(model.weight)

        def loss(some):
            self.batches.append(list(some))
            return (model(self.x[some])[:, 0] - self.y[some]).square().mean()

        @torch.no_grad()
        def score(part):
            some = slice(40, 50) if part == "validation" else slice(50, 60)
            error = (model(self.x[some])[:, 0] - self.y[some]).square()
            return error.mean().item(), (error < 1).float().mean().item()

        return SimpleNamespace(module=model, weights=[model.weight], loss=loss, score=score)


def test_the_last_layer_alone_scores_as_the_model_does():
    transformers = pytest.importorskip("transformers")
    from benchmarks.method_jobs import LastLayer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    prompts, words = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]], [11, 7]
    lengths = torch.tensor([len(ids) for ids in prompts])
    hidden = torch.full((3, 7, 24), 100.0)  # padding, that must not be seen
    expected = torch.empty(3, 2)
    with torch.no_grad():
        for row, ids in enumerate(prompts):
            given = model(torch.tensor([ids]), output_hidden_states=True)
            hidden[row, : len(ids)] = given.hidden_states[-2][0]
            expected[row] = given.logits[0, -1, words]
        scores = LastLayer(model, words)(hidden, lengths)
    assert expected.abs().max() > 1
    # Sums of up to 40 products in another order, in three places one after another.
    assert (scores - expected).abs().max() <= 3 * 40 * 2**-24 * expected.abs().max()


def _run(lr, seed, validation_loss, test_loss=1.0, **other):
    columns = dict(job="toy", mode="full", method="MeZO", budget=216, lr=lr, seed=seed)
    ends = dict(
        validation_loss=validation_loss,
        validation_accuracy=0.5,
        curve_forwards="0 72",
        curve_loss=f"2 {test_loss}",
        curve_accuracy="0.25 0.5",
    )
    return methods.Run(**columns | ends | dict(steps=36, forwards=72, weights=5, seconds=1) | other)


@needs_native
@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_takes_the_budget_and_no_forward_pass_more(name):
    job, entry = ToyJob(), ENTRIES[name]
    made = methods.train(job, entry, "full", entry.lr["full"], seed=0)
    backward = 3 if entry.backward else 1  # a backward pass counts as two
    assert made["forwards"] <= len(job.batches) * backward <= job.budget
    if entry.forwards:
        assert made["forwards"] == job.budget // entry.forwards * entry.forwards == job.budget
        assert made["steps"] == job.budget // entry.forwards
        assert made["curve_forwards"] == "0 72 144 216"
    else:  # directions grow in number: the last step did not fit
        assert job.budget - 30 < made["forwards"] <= job.budget
    start, *_, end = made["curve_loss"].split()
    assert end != start
    assert made["weights"] == 5


def test_a_step_that_does_not_fit_is_undone():
    job, fits, entry = ToyJob(), ToyJob(), ENTRIES["FZOO"]
    fits.budget, job.budget = 72, 80  # 8 steps of 9, and 8 forward passes that are no step
    made, whole = (methods.train(j, entry, "full", 1e-6, seed=0) for j in (job, fits))
    assert (made["steps"], made["forwards"]) == (8, 72)
    assert len(job.batches) == 80
    # lr falls by the budget, so the runs are not the same; their first steps and rows are.
    assert job.batches[:72] == fits.batches


def test_all_methods_see_the_same_rows_in_the_same_order():
    seen = {}
    for name in ("MeZO", "FZOO", "AdaMeZO"):
        job = ToyJob()
        methods.train(job, ENTRIES[name], "full", 1e-6, seed=3)
        seen[name] = [rows for rows, _ in itertools.groupby(job.batches)]
    assert seen["MeZO"] == seen["AdaMeZO"]
    assert seen["FZOO"] == seen["MeZO"][: len(seen["FZOO"])]


def test_a_search_goes_on_where_it_was_stopped(tmp_path):
    path, job, entry = tmp_path / "runs.csv", ToyJob(), ENTRIES["MeZO"]
    search = methods.Search(job, path, seeds=[0, 1], lrs=[1e-3, 1e-2])
    search.deadline = -math.inf
    assert not search.run(entry, "full")
    search.deadline = math.inf
    assert search.run(entry, "full")
    made = methods.read(path)
    assert {r.key for r in made} == {
        ("toy", "full", "MeZO", 216, lr, seed) for lr in (1e-3, 1e-2) for seed in (0, 1)
    }
    job.batches.clear()
    assert search.run(entry, "full")
    assert not job.batches
    assert methods.read(path) == made
    methods.append(path, made[0])  # another process was faster
    assert methods.read(path) == made
    assert search.run(replace(entry, name="another", of="MeZO"), "full")
    assert len(methods.read(path)) == 8


@pytest.mark.parametrize(("optimum", "tried"), [(0, 5), (2, 6), (-3, 7), (9, 9), (-9, 9)])
def test_the_grid_grows_until_the_best_is_inside(tmp_path, monkeypatch, capsys, optimum, tried):
    entry = ENTRIES["MeZO"]

    def train(job, entry, mode, lr, seed):
        place = 2 * math.log10(lr / entry.lr[mode])
        loss = abs(place - optimum)
        # The test rows have another opinion, which must not count.
        columns = dict(curve_forwards="72", curve_loss=f"{-loss}", curve_accuracy="0")
        ends = dict(validation_loss=loss, validation_accuracy=0.0, **columns)
        return dict(steps=36, forwards=72, weights=5, seconds=1.0, **ends)

    monkeypatch.setattr(methods, "train", train)
    path = tmp_path / "runs.csv"
    assert methods.Search(ToyJob(), path).run(entry, "lora")
    made = methods.read(path)
    rates = sorted({r.lr for r in made})
    assert len(rates) == tried
    assert len(made) == tried * len(methods.SEEDS)
    inside = abs(optimum) < methods.FARTHEST
    assert (methods.at_an_edge(made) == 0) == inside
    assert ("the last one that is tried" in capsys.readouterr().out) != inside
    if inside:
        assert methods.best(made)[0].lr == methods.rate(entry, "toy", "lora", optimum)


def test_the_chosen_lr_is_run_with_the_seeds_that_did_not_search(tmp_path, monkeypatch):
    entry = ENTRIES["MeZO"]

    def train(job, entry, mode, lr, seed):
        # By seed 0 the lr at the upper edge, by the others the lowest.
        loss = abs(2 * math.log10(lr / entry.lr[mode]) - (2 if seed == 0 else -2))
        columns = dict(curve_forwards="72", curve_loss="0", curve_accuracy="0")
        ends = dict(validation_loss=loss, validation_accuracy=0.0, **columns)
        return dict(steps=36, forwards=72, weights=5, seconds=1.0, **ends)

    monkeypatch.setattr(methods, "train", train)
    path = tmp_path / "runs.csv"
    assert methods.Search(ToyJob(), path, searching=1).run(entry, "full")
    made = methods.read(path)
    chosen = methods.rate(entry, "toy", "full", 2)
    assert [r.lr for r in made if r.seed == 0] == [
        methods.rate(entry, "toy", "full", place) for place in (-2, -1, 0, 1, 2, 3)
    ]
    assert [(r.lr, r.seed) for r in made if r.seed != 0] == [(chosen, 1), (chosen, 2)]
    assert methods.chosen_lr(made) == chosen
    assert methods.at_an_edge(made) == 0
    assert {r.seed for r in methods.best(made)} == {0, 1, 2}


def test_the_best_lr_is_chosen_by_the_validation_rows_and_the_seeds_that_all_have():
    good = [_run(0.2, seed, loss, 5.0) for seed, loss in enumerate([0.5, 0.7])]
    runs = [_run(0.1, 0, 0.1), _run(0.1, 1, 1.2), *good]
    assert methods.best(runs) == good
    fewer = [*runs, _run(0.3, 0, 0.3)]  # by seed 0, which all have
    assert methods.best(fewer) == runs[:2]
    assert methods.at_an_edge(fewer) == -1
    assert methods.best([*fewer, _run(0.4, 1, 0.0)]) == []  # no seed is with all
    assert methods.best([]) == []
    assert methods.best([_run(0.1, 0, math.inf), _run(0.2, 0, 3.0)])[0].lr == 0.2


def test_a_run_survives_the_csv_and_one_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    lost = _run(1e-3, 0, math.inf, math.nan, device='a "quoted", name')
    methods.append(path, lost)
    (read,) = methods.read(path)
    assert read.key == lost.key
    assert read.validation_loss == math.inf
    assert math.isnan(read.end[0])
    assert read.device == lost.device
    path.write_text(path.read_text().replace("seconds", "minutes", 1))
    with pytest.raises(ValueError, match="run the benchmark again"):
        methods.read(path)


@pytest.mark.parametrize("name", ENTRIES)
def test_what_a_method_keeps_is_measured(name):
    entry = ENTRIES[name]
    job = ToyJob()
    stepper = method_costs.Stepper(job, entry, "full")
    kept = method_costs.kept_bytes(stepper.optimizer)
    numbers = method_costs.history_bytes(stepper.optimizer) / 8
    expected = {
        "AdamW, by backpropagation": 5 * 12 + 4,  # a gradient, two moments; a count of steps
        "SGD, by backpropagation": 5 * 4,
        "HiZOO": 5 * 4,
        "HELENE": 5 * 8,
        "ZOAdaMU": 5 * 4,
        "ZOAdam": 5 * 8,
    }
    assert kept == expected.get(name, 0)
    remembered = {"AdaMeZO": 20, "ScalarAdaMeZO": 20, "momentum": 20, "MEAZO": 1}
    if name not in expected:
        assert numbers == remembered.get(name, 0)


def test_costs_are_of_pairs_of_steps(monkeypatch):
    clock = itertools.count()

    def step(self, rows):
        next(clock)
        return (2.0, 2) if self is made[0] else (3.0, 9)

    made = []

    def stepper(job, entry, mode):
        made.append(SimpleNamespace(start=job.start(mode, 0), optimizer=entry))
        made[-1].step = step.__get__(made[-1])
        return made[-1]

    monkeypatch.setattr(method_costs, "Stepper", stepper)
    monkeypatch.setattr(method_costs, "kept_bytes", lambda optimizer: 20)
    monkeypatch.setattr(method_costs, "history_bytes", lambda optimizer: 8)
    found = method_costs.cost(ToyJob(), ENTRIES["FZOO"], "full", repeats=5)
    assert next(clock) == 10
    assert (found["ratio"], found["median_s"], found["repeats"]) == (1.5, 3.0, 5)
    made.clear()
    with pytest.raises(RuntimeError, match="took .9. forward passes a step, expected 2"):
        method_costs.cost(ToyJob(), ENTRIES["MEAZO"], "full", repeats=5)


def test_the_table_of_methods_says_how_each_ended():
    job = next(iter(methods.BUDGETS))
    columns = dict(job=job, budget=methods.BUDGETS[job])
    runs = [
        _run(0.1 * k, s, abs(k - 2), 0.3 + s / 10, **columns) for k in (1, 2, 3) for s in (0, 2)
    ]
    runs += [_run(0.5, s, 1, 0.2, method="AdaMeZO", **columns) for s in (0, 2)]
    cost = method_costs.Cost(job, "full", "MeZO", 10, 2, 40, 16, ratio=1.0)
    first, second = tables.compared_block(runs, [cost], job, "full").splitlines()[2:]
    assert first.startswith("| AdaMeZO | 2 |  |  |  |  | 0.200 (0.200 to 0.200) |")
    assert "0.5 (of 1, at an edge)" in first
    assert second == (
        "| MeZO | 2 | 4 | 16 | 1.00x | 1.00x | 0.400 (0.300 to 0.500) | 0.500 (0.500 to 0.500) "
        "| 0.2 (of 3) | 2 |"
    )
    assert tables.compared_block(runs, [cost], job, "lora") == "Not measured yet."


def test_the_methods_are_drawn_from_the_csv(tmp_path):
    path = tmp_path / "methods.csv"
    for job, budget in methods.BUDGETS.items():
        for seed in methods.SEEDS:
            for name in ("MeZO", "AdaMeZO"):
                columns = dict(job=job, budget=budget, method=name)
                methods.append(path, _run(0.1, seed, 1.0, 0.5 + seed / 10, **columns))
    plots.plot_methods(path)
    assert path.with_suffix(".png").stat().st_size > 10_000
