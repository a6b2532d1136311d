"""The benchmarks: rows, the harness, the gate, the baselines, what is rendered, small runs."""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adamezo import AdaMeZO, PerturbedBatch, batched
from adamezo_kernels import PhiloxState, ops
from benchmarks import (
    harness,
    horizon,
    kernels,
    methods,
    python_part,
    results,
    sixteen_bit,
    step,
    step_jobs,
)
from benchmarks.harness import Variant
from benchmarks.library_calls import AsReleased, Fair, LibraryOptimizer, Update, coefficients
from benchmarks.render import __main__ as pages
from benchmarks.render import kernels as kernel_tables
from benchmarks.render import steps as step_tables
from benchmarks.render import style, training
from benchmarks.results import RESULTS, Row, frame, pick, settings
from benchmarks.step_jobs import ADAMEZO, ADAMEZO_20, BARE, METHODS, MEZO, RELEASED, Job, Method
from helpers.backends import needs_native

FILES = sorted(RESULTS.glob("*.csv"))
ROW = Row(
    *("kernels", "time", "s", "native"),
    settings(what="update", type="bfloat16", horizon=10, threads=1, isa="avx512"),
    *("elements", 10_000_000, 0.0625, 0.0615, 0.064, 7),
    device='A "quoted", name, 2 cores',
    clock_hz=3.5e9,
    command="python -m benchmarks.kernels",
)


def identity(row):
    """Two rows with the same identity would be two answers to one question."""
    return row.benchmark, row.metric, row.variant, row.settings, row.x_name, row.x_value


# Rows --------------------------------------------------------------------------------------------


def test_rows_survive_the_csv(tmp_path):
    path = tmp_path / "new" / "r.csv"
    made = [
        ROW,
        Row("step", "peak memory", "B", "ours", x_name="horizon", x_value=0, median=2**40 + 1),
        Row("step", "time", "s", "did not fit"),
        Row("methods", "test loss", "1", "lost", median=math.inf, repeats=3),
    ]
    results.write(path, made)
    assert results.load(path) == made
    results.write(path, [ROW, replace(ROW, median=math.nan)])  # the score of a run that was lost
    assert results.load(path) == [ROW, replace(ROW, median=None)]


def test_a_row_is_found_by_its_settings_and_its_x():
    table = frame([ROW, replace(ROW, variant="torch", x_value=5, median=1.0)])
    found = pick(table, isa="avx512", horizon=10, elements=10_000_000)
    assert list(found["median"]) == [0.0625]
    assert list(pick(table, elements=[5, 6]).variant) == ["torch"]
    assert list(pick(table, job=None, threads=1).variant) == ["native", "torch"]
    assert pick(table, isa=None).empty
    with pytest.raises(ValueError, match="'flavour'.*SETTINGS"):
        frame([replace(ROW, settings="flavour=sweet")])


def test_a_csv_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "r.csv"
    results.write(path, [ROW])
    path.write_text(path.read_text().replace("variant", "kind", 1))
    with pytest.raises(ValueError, match="run the benchmark again"):
        results.load(path)


def test_a_run_is_made_once(tmp_path, capsys):
    path = tmp_path / "r.csv"
    run = replace(ROW, x_value=None, median=None, p20=None, p80=None, repeats=0)
    made = []

    def make(value):
        made.append(value)
        return [("loss", "1", 0, value, 1), ("loss", "1", 3, value / 2, 1)]

    first = results.run_once(path, run, lambda: make(4.0))
    assert [(r.metric, r.x_value, r.median, r.repeats) for r in first] == [
        ("loss", 0, 4.0, 1),
        ("loss", 3, 2.0, 1),
    ]
    assert results.run_once(path, run, lambda: make(8.0)) == first == results.load(path)
    second = results.run_once(path, replace(run, variant="other"), lambda: make(8.0))
    assert results.load(path) == [*first, *second]
    assert made == [4.0, 8.0]
    assert capsys.readouterr().out.count("there already") == 1


def test_a_run_that_another_process_has_added_meanwhile_counts(tmp_path):
    path, run = tmp_path / "runs.csv", results.Row("a", "", "", "b", "lr=1", "forwards")
    others = []

    def make(loss):
        if not others:  # the other process begins later, and ends before
            others.append(None)
            others.extend(results.run_once(path, run, lambda: make(4.0)))
        yield "loss", "1", 0, loss, 1

    made = results.run_once(path, run, lambda: make(8.0))
    assert [row.median for row in made] == [4.0]
    assert made == others[1:] == results.load(path)


def test_a_file_that_was_cut_is_refused(tmp_path):
    path, run = tmp_path / "runs.csv", results.Row("a", "", "", "b", "lr=1", "forwards")
    results.run_once(path, run, lambda: [("loss", "1", 0, 4.0, 1)])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="ends in the middle of a row"):
        results.run_once(path, run, lambda: [("loss", "1", 0, 4.0, 1)])


def test_a_run_is_summed_up_by_its_quantiles():
    found = results.spread([0.5, 0.25, 1.0])
    assert found == pytest.approx(dict(median=0.5, p20=0.35, p80=0.8, repeats=3))


def test_a_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--methods", "MeZO, n = 4"])
    assert results.command_line().endswith(" --methods 'MeZO, n = 4'")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_committed_file_is_whole(path):
    rows = results.load(path)
    identities = {identity(row) for row in rows}
    assert len(identities) == len(rows) > 0
    for row in rows:
        needed = (row.device, row.torch, row.commit, row.command, row.date)
        assert all(needed), row
        assert row.p20 is None or row.p20 <= row.median <= row.p80, row
        assert "n = 4" not in row.command.replace("'MeZO, n = 4'", ""), row


# The harness -------------------------------------------------------------------------------------


def test_variants_are_timed_in_turn_with_their_threads():
    seen = []
    before = torch.get_num_threads()
    variants = [
        Variant(name, lambda name=name: seen.append((name, torch.get_num_threads())), threads)
        for name, threads in (("a", 1), ("b", 2))
    ]
    harness.interleave(variants, repeats=3, sample_s=0.0)
    rounds = seen[-6:]
    assert [name for name, _ in rounds] == ["a", "b"] * 3
    assert all(threads == {"a": 1, "b": 2}[name] for name, threads in seen)
    assert [len(v.seconds) for v in variants] == [3, 3]
    assert torch.get_num_threads() == before


# The gate ----------------------------------------------------------------------------------------

OPERATIONS = ("sample_", "perturb_", "update_terms_")


def test_gate_lets_equal_bits_pass():
    harness.gate([torch.bfloat16], backend="reference")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gate_refuses_one_wrong_bit(monkeypatch, operation):
    right = {name: getattr(ops, name) for name in OPERATIONS}

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
    with pytest.raises(harness.GateError, match=f"{operation}.* of 4137 elements differ"):
        harness.gate([torch.float32], backend="wrong")


@pytest.mark.parametrize("command", ["kernels", "step"])
def test_no_speed_is_measured_where_the_gate_is_red(tmp_path, command):
    """The command ends before it has written anything."""
    output = tmp_path / "out.csv"
    code = (
        "import runpy, sys; from benchmarks import harness\n"
        "def red(*arguments, **options): raise harness.GateError('red')\n"
        "harness.gate = red\n"
        f"sys.argv = ['x', '--quick', '--output', {str(output)!r}]\n"
        f"runpy.run_module('benchmarks.{command}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "GateError: red" in done.stderr
    assert not output.exists()


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


@pytest.mark.parametrize("operations", [Fair, AsReleased])
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
    Fair([weights]).update_(Update([1] * 50, [1.0] + [1 / 1024] * 49, None, lr=-1.0))
    z = torch.empty(64).normal_(generator=torch.Generator().manual_seed(1))
    expected = (z.double() * (1 + 49 / 1024)).bfloat16()
    # One unit in the last place, where float32 sums and the exact ones round to two neighbours.
    assert ((weights - expected).abs() <= expected.abs() * 2**-7).all()


def test_coefficients_are_the_papers():
    first, second = coefficients([2.0, -3.0], (0.7, 0.9))
    assert first == pytest.approx([0.3 * 2, 0.3 * 0.7 * -3], rel=1e-12)
    assert second == pytest.approx([0.1 * 4, 0.1 * 0.9 * 9], rel=1e-12)
    assert coefficients([2.0], (0.0, 0.0)) == ([2.0], None)


# The grid ----------------------------------------------------------------------------------------


def test_the_grid_holds_every_case_that_was_asked_for():
    grid = list(kernels.cpu_cases(["avx512", "avx2", "portable"], 2, quick=False))
    assert {c.elements for c in grid} == {10**n for n in range(4, 9)}
    wanted = itertools.product(kernels.TYPES, kernels.HORIZONS)
    assert {(c.type, c.horizon) for c in grid if c.what == "update"} == set(wanted)
    for case in grid:
        columns = [(c.name, c.isa, c.threads) for c in case.columns]
        assert ("native", "avx512", 1) in columns
        assert ("native", "portable", 1) in columns or case.elements >= 10**7
        assert ("torch", "", 1) in columns
        assert len(set(columns)) == len(columns)


@needs_native
def test_the_gpus_cases_can_be_called():
    """On a CPU, by the backend that is there."""
    grid = list(kernels.gpu_cases(["native"], quick=True))
    assert {c.what for c in grid} == {"perturb", "update", "update adam", "update hizoo"} | {
        "update helene",
        "update adamu",
    }
    for case in grid:
        small = replace(case, elements=1000)
        timed = kernels.variants(small)
        harness.interleave(timed, repeats=1, sample_s=0.0)
        made = list(kernels.rows_of(small, timed, {}))
        assert len({identity(row) for row in made}) == len(case.columns)


def test_a_gpus_kernels_are_set_beside_what_bounds_them():
    of = settings(what="update", by="CUDA", type="bfloat16", target="sm_90")
    counts = {
        "registers": 79,
        "bytes moved a weight": 4,
        "instructions a normal": 33,
        "instructions a weight": 42,
    }
    made = [Row("budget", name, "1", "exact", of, median=n) for name, n in counts.items()]
    seconds = {"exact, nearest": 0.040, "exact, nearest, Triton": 0.050, "memcpy": 0.004}
    for variant, median in seconds.items():
        copy = variant == "memcpy"
        of = settings(what=variant if copy else "update", type="bfloat16", horizon=10 - 10 * copy)
        key = ("gpu_kernels", "time", "s", variant, of, "elements", 10**9)
        made.append(Row(*key, median=median, device="a GPU", clock_hz=1.5e9))
    lines = kernel_tables.gpu(frame(made)).splitlines()[2:]
    # 372 instructions for 32 elements each, 132 * 4 of them a cycle, are 14.7 ms.
    assert lines[0].split("|")[2:5] == [" 25 ", " 37% ", " issue "]
    assert lines[1].split("|")[2:5] == [" 20 ", "  ", "  "]  # Triton's was not counted


# What is rendered --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return results.read(*FILES)


@pytest.mark.parametrize("name", pages.PAGES)
def test_tables_are_what_the_committed_files_say(committed, name):
    text, new = pages.page(name, committed)
    assert new == text, f"{name} is out of date: run `python -m benchmarks.render`"
    assert text.count("<!-- /") == len(pages.PAGES[name])


def test_the_plots_are_drawn_from_the_committed_files(committed, tmp_path):
    for draw in pages.PLOTS.values():
        draw(committed, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in RESULTS.glob("*.png")}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))


def test_attacks_were_as_many_as_was_promised(committed):
    some = pick(committed, benchmark="reliability", metric="count")
    counts = some[some.outcome.isna()].set_index("variant")["median"]
    for mode in ("inplace", "exact"):
        assert counts[f"errors raised inside the model, {mode}"] >= 1000
        assert counts[f"signals at random times, {mode}"] >= 1000
    assert counts["damaged logs"] >= 10**6
    assert counts["SIGKILL"] >= 50
    assert counts["a log of 20,000 steps"] < 10**6


def test_a_table_is_rewritten_and_only_it():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb"
    new = style.rewrite(text, {"one": "new"})
    assert new == "a\n<!-- one -->\nnew\n<!-- /one -->\nb"
    assert style.rewrite(new, {"one": "new"}) == new
    with pytest.raises(ValueError, match="two -->"):
        style.rewrite(text, {"two": "x"})


def kernel_rows(seconds):
    base = settings(what="update", type="bfloat16", horizon=10, threads=1)
    names = {"torch": seconds, "as released": 4 * seconds, "native, rademacher": 0.001}
    made = [replace(ROW, variant=v, settings=base, median=m) for v, m in names.items()]
    avx2 = replace(ROW, settings=ROW.settings.replace("avx512", "avx2"), median=0.125)
    return frame([ROW, avx2, *made])


def test_tables_show_what_the_rows_say():
    rows = kernel_rows(0.421875)
    table = kernel_tables.speeds(rows, kernel_tables.ISAS, [("update", 10), ("perturb", 1)])
    # 0.0625 s at 3.5 GHz for 1e8 normals
    (line,) = table.splitlines()[2:]
    assert line == (
        "| update H = 10, bfloat16 | 10,000,000 | 23.7 |  | 80 (3.4x, 4.38 c) | "
        "160 (6.8x, 2.19 c) |"
    )
    assert "3.50 GHz" in style.conditions(rows, ["kernels"])


def test_ours_beside_library_calls_is_the_exact_kernel():
    """And not a faster one of other directions."""
    table = kernel_tables.speeds(kernel_rows(1.0), kernel_tables.BASELINES, [("update", 10)])
    assert "| 160 (16.0x, 2.19 c) | 2.5 (0.2x, 140.00 c) | 10 |" in table


def test_committed_tables_have_no_empty_columns(committed):
    """A table is of the sizes at which what it compares was timed."""
    for name in ("baselines", "kinds", "threads"):
        lines = pages.PAGES["docs/performance_kernels.md"][name](committed).splitlines()
        assert all(cell.strip() for line in lines for cell in line.split("|")[2:-1]), name


def test_what_was_not_measured_is_said():
    nothing = frame([])
    assert step_tables.parts(nothing, "paper") == style.NOT_YET
    assert step_tables.by_job(nothing, MEZO, "paper", part="step") == style.NOT_YET
    assert style.conditions(nothing, ["step"]) == style.NOT_YET
    assert training.compared(nothing, "layer", "full") == style.NOT_YET


def timed(method, tokens, benchmark="step", kind="bfloat16", **parts):
    job = Job(benchmark, "", kind, int(tokens.split("x")[1]), int(tokens.split("x")[0]))
    return [
        step.row(job, method, "time", "s", {}, part=part, median=value)
        for part, value in parts.items()
    ]


def peaked(method, tokens, value, benchmark="paper"):
    (row,) = timed(method, tokens, benchmark, step=value)
    columns = row.settings.replace("part=step; ", "")
    return replace(row, metric="peak memory", unit="B", settings=columns)


def test_steps_of_all_jobs_are_beside_each_other():
    made = [
        *timed(MEZO, "16x32", kind="float32", step=1.0),
        *timed(ADAMEZO, "16x32", kind="float32", step=2.0),
        *timed(ADAMEZO, "16x64", "paper", step=0.9),
        peaked(BARE, "16x64", 2**30),
        peaked(ADAMEZO, "16x64", 2**31),
    ]
    table = step_tables.by_job(frame(made), MEZO, ["step", "paper"], metric="time", part="step")
    assert table.splitlines() == [
        "|  | CPU, float32, 16x32 | GPU, bfloat16, 16x64 |",
        "| --- | --: | --: |",
        "| MeZO, ours | 1 s (1x) |  |",
        "| AdaMeZO H = 10, ours | 2 s (2x) | 0.9 s |",
    ]
    table = step_tables.by_job(frame(made), BARE, "paper", metric="peak memory")
    assert table.splitlines()[2:] == [
        "| a bare forward | 1,024 MiB (1x) |",
        "| AdaMeZO H = 10, ours | 2,048 MiB (2x) |",
    ]


def test_the_optimizers_share_of_a_step():
    made = timed(ADAMEZO, "16x32", step=4.0, forwards=3.0, perturbation=0.4, update=0.6)
    made = [replace(row, p20=row.median, p80=row.median) for row in made]
    line = step_tables.parts(frame(made), "step").splitlines()[2]
    assert "| 3.000 | 0.400 | 0.600 | 4.000 [4.000, 4.000] | 0 | 25.0% |" in line


# Steps -------------------------------------------------------------------------------------------

TOY = Job("paper", "OPT-tiny", "bfloat16", 8, batch=2)


@pytest.fixture
def toy():
    pytest.importorskip("transformers")
    return TOY


@needs_native
def test_the_gpus_plan_runs_from_end_to_end_without_a_gpu(toy, tmp_path, monkeypatch, capsys):
    output = tmp_path / "paper_gpu.csv"
    few = replace(step_jobs.PLANS["paper_gpu"], peaks=[ADAMEZO])
    monkeypatch.setitem(step_jobs.PLANS, "paper_gpu", few)
    command = "paper_gpu --quick --model OPT-tiny --device cpu --output"
    monkeypatch.setattr(sys, "argv", ["x", *command.split(), str(output)])
    step.main()
    made = results.read(output)
    assert len({identity(row) for row in results.load(output)}) == len(made)
    left_out = {line for line in capsys.readouterr().out.splitlines() if "left out" in line}
    whole = pick(made, part="step")
    able = [m for m in METHODS if not m.missing("cpu")]
    found = set(zip(whole.method, whole.variant, whole.horizon, strict=True))
    assert found == {(m.method, m.variant, m.horizon) for m in able}
    assert len(left_out) == len(METHODS) - len(able)
    assert {"MeZO", "AdaMeZO", "AdamW", "bare"} == {m.method for m in able}
    assert set(pick(made, metric="time").repeats) == {3}
    assert pick(made, metric="time")["median"].notna().all()
    bare, ours = pick(made, metric="peak memory")["median"]
    assert bare > 0
    assert ours > 0
    assert "AdaMeZO H = 10, ours | bfloat16, 16x64" in step_tables.parts(made, "paper")


def test_no_more_steps_of_a_method_that_takes_long(toy, monkeypatch):
    monkeypatch.setattr(step, "ENOUGH_S", 0.0)
    made = frame(step.measure(toy, [BARE, MEZO], {}, 5))
    assert set(made.repeats) == {2}


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
        return batched(toy.losses(model))()

    monkeypatch.setattr(step_jobs, "AdaMeZO", Noted)
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
        return step_jobs.bare_forwards(2, closure)

    make = Method.make
    monkeypatch.setattr(Method, "make", lambda m, *rest: bare if m == BARE else make(m, *rest))
    step.measure(toy, [BARE, RELEASED[ADAMEZO]], {}, 3)
    assert all(some == addresses[0] for some in addresses)


@pytest.mark.parametrize(
    ("times", "value", "message"),
    [(1, 1.0, "1 times, expected 2"), (2, float("nan"), "was not a step")],
)
def test_a_step_that_was_none_is_not_timed(times, value, message):
    def some(closure):
        return sum(closure() for _ in range(times))

    split = step.Split(MEZO, some, lambda batch: torch.tensor([value]), "cpu")
    with pytest.raises(RuntimeError, match=message):
        split.once()


def test_a_step_is_split_where_its_closure_begins_and_ends(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    two = functools.partial(step_jobs.bare_forwards, 2)
    split = step.Split(MEZO, two, lambda batch: torch.ones(1), "cpu")
    split.once()
    assert split.seconds == {"perturbation": [1 + 4], "forwards": [2 + 8], "update": [16]}
    assert split.total == [31.0]


# The horizon -------------------------------------------------------------------------------------


def test_an_update_vector_is_the_rules():
    grads, betas = [3.0, -1.0, 0.5, 2.0], (0.7, 0.9)
    first, second = coefficients([2.0, 0.5, -1.0], betas)
    m = v = size = 0
    for age, (a, b) in enumerate(zip(first, second, strict=True)):
        z = ops.sample_(torch.empty(1000), PhiloxState(step_jobs.SEED, 1000 - age)).double()
        m, v, size = m + a * z, v + b * z**2, size + abs(a * z)
    found = horizon.update_vector(grads, betas, 3, 1000)
    # Two float32 sums of three terms, a root and a division: at most 16 roundings of 2^-24 each.
    error = (found - m / (v.sqrt() + 1e-8)).abs()
    assert (error <= 16 * 2**-24 * size / v.sqrt()).all()


def test_a_horizon_as_long_as_the_run_leaves_nothing_out(monkeypatch):
    monkeypatch.setattr(horizon, "TIMES", (3, 4))
    made = horizon.distances([[1.0, -2.0, 3.0, 0.5]], (0.7, 0.9), [1, 4, 9], 1000, {})
    found = {(row.metric, row.x_value): row.median for row in made}
    for h in (4, 9):
        for metric in ("cosine", "cosine, worst"):
            assert found[metric, h] == pytest.approx(1, abs=1e-6)  # a float32 dot product
    assert found["cosine, worst", 1] <= found["cosine", 1] < 0.9


def test_recorded_runs_are_longer_than_the_longest_horizon():
    assert all(len(run) >= max(horizon.TIMES) for run in horizon.recorded())
    assert min(horizon.TIMES) > max(step_jobs.BY_HORIZON)


def test_the_table_of_horizons_has_their_price():
    betas = settings(betas="0.7, 0.9")
    made = [
        Row("horizon", metric, "1", "AdaMeZO", betas, "horizon", h, cosine)
        for h, cosine in ((1, 0.5), (5, 0.92))
        for metric in ("cosine", "cosine, worst")
    ]
    for h, seconds in ((1, 2.0), (5, 2.5)):
        made += timed(Method("ours", "AdaMeZO", h), "16x32", "horizon", "float32", step=seconds)
    lines = step_tables.horizons(frame(made)).splitlines()[2:]
    assert lines == ["| 1 | 1.00x | 0.500 (0.500) |", "| 5 | 1.25x | 0.920 (0.920) |"]


# 16 bits -----------------------------------------------------------------------------------------


def test_what_moved_is_told_apart_from_what_stayed():
    before = torch.tensor([1.0, -2.0, 2.0, 4.0])
    found = sixteen_bit.change(torch.tensor([1.0, -2.0, 2.0, 5.0]), before)
    assert found["changed"] == 0.25
    assert found["drift"] == pytest.approx(0.5 / 2.5)
    assert found["mean"] == pytest.approx(0.25 / 2.5)
    assert sixteen_bit.change(-0.0 * before, 0.0 * before)["changed"] == 1  # a sign is a bit


def test_a_run_that_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "large.csv"
    made = []

    def large(chosen):
        made.append((chosen.dtype, chosen.perturbation, chosen.seed))
        return [("held-out loss", "1", 0, 1.0, 1), ("held-out loss", "1", 3, 0.5, 1)]

    monkeypatch.setattr(sixteen_bit, "large", large)
    argv = ["x", "large", "--seeds", "0", "1", "--steps", "3", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    sixteen_bit.main()
    assert len(made) == 2 * len(sixteen_bit.VARIANTS) == 10
    assert made[:2] == [("float32", "inplace", 0), ("bfloat16", "inplace", 0)]
    first = path.read_bytes()
    sixteen_bit.main()
    assert len(made) == 10
    assert path.read_bytes() == first
    assert capsys.readouterr().out.count("there already") == 10


def test_small_steps_move_weights_by_little():
    """Of a head on random features; rounded to nearest, a bfloat16 weight mostly stays."""
    generator = torch.Generator().manual_seed(0)
    rows = SimpleNamespace(
        features=torch.randn(50, 7, generator=generator),
        positive=torch.randint(0, 2, (50,), generator=generator),
    )
    moved = {}
    for variant in sixteen_bit.VARIANTS:
        found = list(sixteen_bit.small(variant, 0, 20, (rows, rows)))
        assert [(metric, at) for metric, _, at, _, _ in found] == [
            (metric, at)
            for at in (0, 20)
            for metric in ("held-out loss", "distance from the start")
        ]
        assert found[1][3] == 0
        moved[variant] = found[3][3]
    assert 0 < moved["float32"] < 1e-3
    assert moved["bfloat16 out of place, nearest"] < moved["bfloat16 in place, nearest"]


# The methods beside each other -------------------------------------------------------------------

ENTRIES = {entry.name: entry for entry in methods.ENTRIES}


class ToyJob:
    """A least squares problem in five weights, with the interface of benchmarks/method_jobs.py."""

    name, budget, batch, rows = "toy", 216, 4, 40
    points = 3

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 5, generator=generator)
        self.y = self.x @ torch.ones(5)
        self.batches = []

    def start(self, mode, seed):
        model = torch.nn.Linear(5, 1, bias=False)
        torch.nn.init.zeros_(model.weight)

        def losses(some, batch):
            self.batches.append(list(some))
            x, y = batch.repeat((self.x[some], self.y[some]))
            return batch.mean((model(x)[:, 0] - y).square())

        @torch.no_grad()
        def score(part):
            some = slice(40, 50) if part == "validation" else slice(50, 60)
            error = (model(self.x[some])[:, 0] - self.y[some]).square()
            return error.mean().item(), (error < 1).float().mean().item()

        def loss(some):
            return losses(some, PerturbedBatch(1))[0]

        weights = [model.weight]
        return SimpleNamespace(module=model, weights=weights, losses=losses, loss=loss, score=score)


@pytest.mark.parametrize("before", [0, 1])
def test_the_last_layer_alone_scores_as_the_model_does(before):
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
    places = torch.tensor([[3, 4], [0, 1], [5, 6]])
    hidden = torch.full((3, 7, 24), 100.0)  # padding, that must not be seen
    expected = torch.empty(3, 2, 50)
    with torch.no_grad():
        for row, ids in enumerate(prompts):
            given = model(torch.tensor([ids]), output_hidden_states=True)
            hidden[row, : len(ids)] = given.hidden_states[-2 - before][0]
            expected[row] = given.logits[0, places[row]]
        every = LastLayer(model, before=before)(hidden, places)
        few = LastLayer(model, words, before)(hidden, places[:, 1:])
    assert expected.abs().max() > 1
    # Sums of up to 40 products in another order, in three places of a layer one after another.
    bound = 3 * (1 + before) * 40 * 2**-24 * expected.abs().max()
    assert (every - expected).abs().max() <= bound
    assert (few[:, 0] - expected[:, 1, words]).abs().max() <= bound


def points(validation_loss, test_loss=1.0):
    """What `methods.train` yields."""
    yield "time", "s", 72, 1.0, 36
    for part, at, loss in (
        ("validation", 72, validation_loss),
        ("test", 0, 2.0),
        ("test", 72, test_loss),
    ):
        yield f"{part} loss", "1", at, loss, 1
        yield f"{part} accuracy", "1", at, 0.5, 1


def _run(lr, seed, validation_loss, test_loss=1.0, method="MeZO", **other):
    chosen = settings(**dict(job="toy", mode="full", budget=216, lr=lr, seed=seed) | other)
    return [
        Row("methods", metric, unit, method, chosen, "forwards", x, value, repeats=repeats)
        for metric, unit, x, value, repeats in points(validation_loss, test_loss)
    ]


def _losses(runs):
    return methods.validated(frame([row for run in runs for row in run]))


def trained(job, name, mode="full", lr=None, seed=0):
    """The points of a run by metric, as lists of (forward passes, value, repeats)."""
    entry, found = ENTRIES[name], {}
    for metric, _, *point in methods.train(job, entry, mode, lr or entry.lr[mode], seed):
        found.setdefault(metric, []).append(tuple(point))
    return found


@needs_native
@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_takes_the_budget_and_no_forward_pass_more(name):
    job, entry = ToyJob(), ENTRIES[name]
    found = trained(job, name)
    ((forwards, _, steps),) = found["time"]
    backward = 3 if entry.backward else 1  # a backward pass counts as two
    if not entry.in_batches:
        assert forwards <= len(job.batches) * backward <= job.budget
    if entry.forwards:
        assert forwards == job.budget // entry.forwards * entry.forwards == job.budget
        assert steps == job.budget // entry.forwards
        assert [at for at, *_ in found["test loss"]] == [0, 72, 144, 216]
    else:  # directions grow in number: the last step did not fit
        assert job.budget - 30 < forwards <= job.budget
    assert found["test loss"][-1][1] != found["test loss"][0][1]
    assert [at for at, *_ in found["validation accuracy"]] == [forwards]


@needs_native
@pytest.mark.parametrize("name", methods.USUAL)
def test_a_method_is_compared_with_directions_of_every_kind(name):
    job = ToyJob()
    seen = {}
    for (of, kind), entry in methods.BY_DIRECTIONS.items():
        start = job.start("full", 0)
        optimizer = entry.make(job, start, 1e-6, 0)
        if of == name:
            assert type(optimizer).__name__ == name
            assert optimizer.param_groups[0]["distribution"] == kind
            seen[kind] = {**optimizer.param_groups[0], "params": None, "distribution": None}
    # And in nothing else: all have the options of the method's own row.
    assert len(seen) == 4
    assert all(options == seen[methods.USUAL[name]] for options in seen.values())
    usual = methods.BY_DIRECTIONS[name, methods.USUAL[name]]
    assert usual is ENTRIES[name]


def test_a_step_that_does_not_fit_is_undone():
    job, fits = ToyJob(), ToyJob()
    fits.budget, job.budget = 72, 80  # 8 steps of 9, and 8 forward passes that are no step
    found, _ = (trained(j, "FZOO", lr=1e-6) for j in (job, fits))
    ((forwards, _, steps),) = found["time"]
    assert (steps, forwards) == (8, 72)
    assert len(job.batches) == 80
    # lr falls by the budget, so the runs are not the same; their first steps and rows are.
    assert job.batches[:72] == fits.batches


def test_all_methods_see_the_same_rows_in_the_same_order():
    seen = {}
    for name in ("MeZO", "FZOO", "AdaMeZO"):
        job = ToyJob()
        trained(job, name, lr=1e-6, seed=3)
        seen[name] = [rows for rows, _ in itertools.groupby(job.batches)]
    assert seen["MeZO"] == seen["AdaMeZO"]
    assert seen["FZOO"] == seen["MeZO"][: len(seen["FZOO"])]


def test_a_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    path, job, entry = tmp_path / "runs.csv", ToyJob(), ENTRIES["MeZO"]
    monkeypatch.setattr(methods, "FARTHEST", 1)
    monkeypatch.setattr(methods, "PLACES", range(-1, 2))
    search = methods.Search(job, path, seeds=[0, 1])
    train = methods.train

    def stopped(job, entry, mode, lr, seed):
        if len(results.read(path).lr.unique()) == 2:
            raise KeyboardInterrupt
        yield from train(job, entry, mode, lr, seed)

    monkeypatch.setattr(methods, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        search.run(entry, "full")
    before = results.load(path)
    monkeypatch.setattr(methods, "train", train)
    search.run(entry, "full")
    made, table = results.load(path), results.read(path)
    assert made[: len(before)] == before
    assert 0 < len(before) < len(made)
    ran = pick(table, metric="time", job="toy", mode="full", variant="MeZO", budget=216)
    lrs = [methods.rate(entry, "toy", "full", place) for place in (-1, 0, 1)]
    assert sorted(zip(ran.lr, ran.seed, strict=True)) == [(lr, s) for lr in lrs for s in (0, 1)]
    job.batches.clear()
    search.run(entry, "full")
    assert not job.batches
    assert results.load(path) == made


@pytest.mark.parametrize(("optimum", "tried"), [(0, 5), (2, 6), (-3, 7), (9, 9), (-9, 9)])
def test_the_grid_grows_until_the_best_is_inside(tmp_path, monkeypatch, capsys, optimum, tried):
    entry = ENTRIES["MeZO"]

    def train(job, entry, mode, lr, seed):
        place = 2 * math.log10(lr / entry.lr[mode])
        loss = abs(place - optimum)
        return points(loss, -loss)  # the test rows have another opinion, which must not count

    monkeypatch.setattr(methods, "train", train)
    path = tmp_path / "runs.csv"
    methods.Search(ToyJob(), path).run(entry, "lora")
    losses = methods.validated(results.read(path))
    assert losses.shape == (tried, len(methods.SEEDS))
    assert losses.notna().all(axis=None)
    inside = abs(optimum) < methods.FARTHEST
    assert (methods.at_an_edge(losses) == 0) == inside
    assert ("the last one that is tried" in capsys.readouterr().out) != inside
    if inside:
        assert methods.chosen_lr(losses) == methods.rate(entry, "toy", "lora", optimum)


def test_the_chosen_lr_is_run_with_the_seeds_that_did_not_search(tmp_path, monkeypatch):
    entry = ENTRIES["MeZO"]

    def train(job, entry, mode, lr, seed):
        # By seed 0 the lr at the upper edge, by the others the lowest.
        return points(abs(2 * math.log10(lr / entry.lr[mode]) - (2 if seed == 0 else -2)))

    monkeypatch.setattr(methods, "train", train)
    path = tmp_path / "runs.csv"
    methods.Search(ToyJob(), path, searching=1).run(entry, "full")
    losses = methods.validated(results.read(path))
    chosen = methods.rate(entry, "toy", "full", 2)
    assert list(losses[0].dropna().index) == [
        methods.rate(entry, "toy", "full", place) for place in (-2, -1, 0, 1, 2, 3)
    ]
    assert list(losses[[1, 2]].dropna().index) == [chosen]
    assert methods.chosen_lr(losses) == chosen
    assert methods.at_an_edge(losses) == 0


def test_the_best_lr_is_chosen_by_the_validation_rows_and_the_seeds_that_all_have():
    runs = [_run(0.1, 0, 0.1), _run(0.1, 1, 1.2), _run(0.2, 0, 0.5, 5.0), _run(0.2, 1, 0.7, 5.0)]
    assert methods.chosen_lr(_losses(runs)) == 0.2
    fewer = [*runs, _run(0.3, 0, 0.3)]  # by seed 0, which all have
    assert methods.chosen_lr(_losses(fewer)) == 0.1
    assert methods.at_an_edge(_losses(fewer)) == -1
    # No seed is with all.
    assert methods.chosen_lr(_losses([*fewer, _run(0.4, 1, 0.0)])) is None
    assert methods.chosen_lr(_losses([_run(0.1, 0, math.inf), _run(0.2, 0, 3.0)])) == 0.2


@pytest.mark.parametrize("name", ENTRIES)
def test_what_a_method_keeps_is_measured(name):
    entry = ENTRIES[name]
    job = ToyJob()
    kept = methods.Stepper(job, entry, "full").kept_bytes
    expected = {
        "AdamW, by backpropagation": 5 * 12 + 4,  # a gradient, two moments; a count of steps
        "SGD, by backpropagation": 5 * 4,
        "HiZOO": 5 * 4,
        "HELENE": 5 * 8,
        "ZOAdaMU": 5 * 4,
        "ZOAdam": 5 * 8,
        # Of its forwards: the signs of four examples' rows and columns, and a piece of normals.
        "GRZO": 4 * (1 + 5) * 4 + 5 * 4,
    }
    assert kept == expected.get(name, 0)


def test_costs_are_of_pairs_of_steps(monkeypatch):
    clock = itertools.count()

    def step(self, rows):
        next(clock)
        return (2.0, 2) if self is made[0] else (3.0, 9)

    made = []

    def stepper(job, entry, mode):
        made.append(SimpleNamespace(start=job.start(mode, 0), kept_bytes=20))
        made[-1].step = step.__get__(made[-1])
        return made[-1]

    monkeypatch.setattr(methods, "Stepper", stepper)
    rows = methods.cost(ToyJob(), ENTRIES["FZOO"], "full", 5, {})
    assert next(clock) == 10
    assert {(r.metric, r.median, r.repeats) for r in rows} == {
        ("kept", 20, 0),
        ("time", 3.0, 5),
        ("time over MeZO's", 1.5, 5),
    }
    made.clear()
    with pytest.raises(RuntimeError, match="took .9. forward passes a step, expected 2"):
        methods.cost(ToyJob(), ENTRIES["MEAZO"], "full", 5, {})


def test_the_table_of_methods_says_how_each_ended():
    columns = dict(job="main", budget=methods.BUDGETS["main"])
    runs = [
        _run(0.1 * k, s, abs(k - 2), 0.3 + s / 10, **columns) for k in (1, 2, 3) for s in (0, 2)
    ]
    runs += [_run(0.5, s, 1, 0.2, method="AdaMeZO", **columns) for s in (0, 2)]
    cost = settings(job="main", mode="full", forwards=2, weights=10)
    kept = {"kept": 40, "time over MeZO's": 1.0}
    costs = [Row("methods costs", m, "", "MeZO", cost, median=v) for m, v in kept.items()]
    rows = frame([*costs, *(row for run in runs for row in run)])
    first, second = training.compared(rows, "main", "full").splitlines()[2:]
    assert first.startswith("| AdaMeZO | 2 |  |  |  | 0.200 (0.200 to 0.200) |")
    assert "0.5 (of 1, at an edge)" in first
    assert second == (
        "| MeZO | 2 | 4 | 1.00x | 1.00x | 0.400 (0.300 to 0.500) | 0.500 (0.500 to 0.500) "
        "| 0.2 (of 3) | 2 |"
    )
    assert training.compared(rows, "main", "lora") == style.NOT_YET


def test_the_table_of_directions_has_a_row_for_each_kind():
    columns = dict(job="layer", budget=methods.BUDGETS["layer"])
    runs = [_run(0.1 * k, 0, abs(k - 2), 0.3, **columns) for k in (1, 2, 3)]
    runs += [_run(0.5, 0, 1, 0.2, method="MeZO, lowrank:4", **columns)]
    rows = frame([row for run in runs for row in run])
    made = training.by_directions(rows, "layer", ["full", "lora"]).splitlines()
    assert made[0] == (
        "|  | directions | full: test loss | full: lr (of so many) | lora: test loss "
        "| lora: lr (of so many) |"
    )
    assert made[2] == "| MeZO | exact | 0.300 | 0.2 (of 3) |  |  |"
    assert made[4] == "| MeZO | lowrank:4 | 0.200 | 0.5 (of 1, at an edge) |  |  |"
    assert len(made) == 2 + 3 * 4


@needs_native
@pytest.mark.parametrize("variant", python_part.VARIANTS)
def test_pythons_part_is_a_step_without_the_compiled_code(variant, monkeypatch):
    """Its calls are those of whole steps: two perturbations and an update of all weights."""
    found = python_part.measure(3, variant, repeats=5)
    step, compiled, python = (torch.tensor(seconds) for seconds in found.values())
    assert len(step) == 5
    assert (compiled > 0).all()
    assert (python > 0).all()
    # Only the closure is left out besides.
    assert (compiled + python <= step).all()


@needs_native
def test_the_rows_of_pythons_part_name_the_target():
    made = list(python_part.rows(2, {}))
    assert len({identity(row) for row in made}) == len(made) == 2 * 3 * 3
    assert sum("target: 60 us" in row.metric for row in made) == 6
    assert all(row.repeats == 2 for row in made)


# The memory of a step ----------------------------------------------------------------------------

PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "OPT-1.3B": 1_315_758_080,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "OPT-13B": 12_853_473_280,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
}


def test_the_shapes_have_as_many_weights_as_the_models(committed):
    pytest.importorskip("transformers")
    from benchmarks import memory

    found = results.pick(committed, benchmark="needs", metric="weights")
    assert dict(zip(found.variant, found["median"], strict=True)) == PUBLISHED
    assert list(memory.MODELS) == list(PUBLISHED)
    ((kind, needs),) = memory.of("SmolLM2-135M", quick=True)
    assert (kind, needs.parameters) == ("one position", PUBLISHED["SmolLM2-135M"])


# The commands ------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize(
    ("command", "least"),
    [
        ("horizon --quick", 88),
        ("sixteen_bit still --quick", 40),
        ("recovery --quick", 9),
    ],
)
def test_a_command_writes_rows(tmp_path, command, least):
    pytest.importorskip("transformers")
    output = tmp_path / "out.csv"
    name, *arguments = command.split()
    line = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--output", str(output)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = results.load(output)
    assert len(rows) >= least
    assert len({identity(row) for row in rows}) == len(rows)
    assert all(row.command.startswith(f"python -m benchmarks.{command}") for row in rows)


@needs_native
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_every_variant_of_a_case_is_timed(kind):
    from adamezo_kernels.backends import native

    for case in kernels.cpu_cases(native.instruction_sets(), 2, quick=False):
        if case.elements == 10**7 and case.type == kind and case.horizon in (1, 10):
            small = replace(case, elements=1000)
            made = kernels.variants(small)
            harness.interleave(made, repeats=1, sample_s=0.0)
            rows = list(kernels.rows_of(small, made, {}))
            assert len({identity(row) for row in rows}) == len(case.columns)
            assert all(row.median > 0 for row in rows)
