"""The long runs' protocol, references and tables (benchmarks/evidence.py), on small stand-ins."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import numpy
import pandas
import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import evidence, methods
from benchmarks.method_jobs import Probed
from benchmarks.render import evidence as tables
from benchmarks.render import seeds
from benchmarks.results import Row, frame, settings


def test_the_grid_is_refined_on_both_sides_of_the_best(tmp_path, monkeypatch):
    """A parabola in log lr with its lowest point between two of the coarse grid's lrs, and outside
    of those it begins with."""
    best, seen = 10 ** (2.6 / 2), []

    def train(job, entry, mode, lr, seed):
        seen.append((lr, seed))
        yield "validation loss", "1", job.budget, math.log10(lr / best) ** 2 + 1, 1
        yield "time", "s", job.budget, 1.0, 1

    class Job:
        name, budget = "toy", 10

    entry = methods.Entry("a", {"full": 1.0})
    monkeypatch.setattr(methods, "train", train)
    path = tmp_path / "runs.csv"
    search = methods.Search(
        Job(), path, range(5), 2, places=(-1, 0, 1), fine=True, finalists=2, benchmark="evidence"
    )
    search.run(entry, "full")
    coarse = [float(f"{10 ** (k / 2):.3g}") for k in (-1, 0, 1, 2, 3, 4)]
    fine = [float(f"{10 ** (k / 2):.3g}") for k in (2.5, 3.5)]
    assert {lr for lr, _ in seen} == {*coarse, *fine}
    # The two best of all, one of which is a fine one, have all seeds; the others the search's.
    finalists = (fine[0], coarse[4])
    assert all([seed for at, seed in seen if at == lr] == [0, 1, 2, 3, 4] for lr in finalists)
    others = {*coarse, *fine} - {*finalists}
    assert all([seed for at, seed in seen if at == lr] == [0, 1] for lr in others)
    table = frame(methods.load(path))
    assert set(table.benchmark) == {"evidence"}


def probed(count: int) -> Probed:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, generator=generator)
    noise = torch.randn(count, generator=generator)
    labels = (x[:, 0] + 0.5 * noise > 0.7).long()
    return Probed(x, torch.zeros(count, 2), labels)


def test_a_fitted_bias_is_that_of_the_classes_shares():
    rows = probed(400)
    matrix, bias = evidence.fitted(rows, 0.0, biased_only=True)
    share = rows.labels.float().mean()
    assert not matrix.any()
    # The solver stops at a gradient of 1e-7, so the probability is that exact.
    assert (bias.softmax(0)[1] - share).abs() < 1e-5
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    assert evidence.scored(rows, matrix, bias)[0] == pytest.approx(entropy.item(), rel=1e-5)


def test_a_probe_is_at_the_lowest_point_of_its_loss():
    rows, weight = probed(400), 1e-2
    matrix, bias = evidence.fitted(rows, weight, biased_only=False)
    matrix.requires_grad_()
    loss = cross_entropy(rows.features @ matrix.T + bias, rows.labels)
    (loss + 0.5 * weight * matrix.square().sum()).backward()
    assert matrix.grad.abs().max() < 1e-4
    assert evidence.scored(rows, matrix.detach(), bias)[0] < 0.5 * math.log(2)


def test_forward_passes_to_a_loss_lie_on_straight_lines():
    curve = pandas.Series([1.0, 0.8, 0.4, 0.5], index=[0.0, 10.0, 20.0, 30.0])
    assert seeds.reached(curve, 0.9) == 5
    assert seeds.reached(curve, 0.5) == 17.5
    assert seeds.reached(curve, 1.5) == 0
    assert seeds.reached(curve, 0.3) == math.inf
    lost = pandas.Series([1.0, math.inf, 0.4], index=[0.0, 10.0, 20.0])
    assert seeds.reached(lost, 0.5) == 20


def test_an_interval_holds_the_mean_as_often_as_it_says():
    numbers = numpy.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    held = [low < 3.0 < high for low, high in map(seeds.interval, numbers)]
    # 95 % and four standard deviations of a share of 4,000.
    assert abs(sum(held) / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)
    assert seeds.interval([0.25] * 5) == (0.25, 0.25)


def test_the_resamples_of_seeds_are_all_of_them():
    """Against every ordered resample, one by one."""
    generator = numpy.random.default_rng(1)
    curves = pandas.DataFrame(
        0.8 - 0.02 * numpy.arange(21)[:, None] + generator.normal(0, 0.05, (21, 4)),
        index=100.0 * numpy.arange(21),
    )
    ends = pandas.Series(generator.normal(0.5, 0.05, 4))
    every = sorted(
        seeds.reached(curves[list(some)].mean(axis=1), ends[list(some)].mean())
        for some in itertools.product(range(4), repeat=4)
    )
    at, low, high = seeds.when_reached(curves, ends)
    assert at == seeds.reached(curves.mean(axis=1), ends.mean())
    least, most = every[math.ceil(0.025 * 256) - 1], every[math.ceil(0.975 * 256) - 1]
    # The order of a sum may change a last bit.
    assert (low, high) == (pytest.approx(least), pytest.approx(most))
    assert low < at < high


def test_every_question_has_methods_of_other_names_and_says_what_differs():
    for entries in evidence.QUESTIONS.values():
        names = [entry.name for entry in entries]
        assert len(set(names)) == len(names)
    of_h = evidence.HORIZONS[5]
    assert (of_h.of, of_h.options(None)) == ("AdaMeZO", {"horizon": 5})


def test_methods_of_one_name_are_one_method():
    """EVERY would drop one of two, and the runs in the file are known by the name alone."""
    for entries in evidence.QUESTIONS.values():
        for entry in entries:
            other = evidence.EVERY[entry.name]
            assert (entry.of or entry.name, entry.lr) == (other.of or other.name, other.lr)
            if not entry.backward and entry.name not in evidence.BY_NAME:
                assert entry.options(None) == other.options(None)


def test_the_question_of_16_bits_is_refused_on_another_job(monkeypatch):
    monkeypatch.setattr("sys.argv", ["evidence", "methods", "bfloat16", "--job", "reviews"])
    with pytest.raises(SystemExit, match="got --job 'reviews', expected one of"):
        evidence.main()


def run(name: str, lr: float, seed: int, end: float, at: int = 2000) -> list[Row]:
    """A run whose loss falls on a straight line, and that ends after so many forward passes."""
    columns = settings(job="layer", mode="full", budget=2000, lr=lr, seed=seed, threads=1)
    rows = [("validation loss", at, end), ("test accuracy", at, 0.8), ("time", at, 20.0)]
    rows += [("test loss", x, 0.8 + (end - 0.8) * x / at) for x in (0, 1000, 2000) if x < at]
    rows += [("test loss", at, end)]
    return [
        Row("evidence", metric, "1", name, columns, "forwards", x, value, repeats=1)
        for metric, x, value in rows
    ]


@pytest.fixture
def two_seeds_and_one_finalist(monkeypatch):
    monkeypatch.setattr(tables, "SEEDS", range(2))
    monkeypatch.setattr(tables, "FINALISTS", 1)


RUNS = [
    *run("MeZO", 1e-3, 0, 0.6), *run("MeZO", 1e-3, 1, 0.62), *run("MeZO", 1e-2, 0, 0.7),
    *run("MeZO", 1e-2, 1, 0.7), *run("AdaMeZO", 1e-3, 0, 0.4), *run("AdaMeZO", 1e-3, 1, 0.42),
    *run("MEAZO", 1e-3, 0, 0.7), *run("MEAZO", 1e-3, 1, 0.71),
]  # fmt: skip


def test_a_search_that_has_not_ended_is_no_row(tmp_path):
    assert tables.answer(frame(RUNS), "methods", "layer", "full") == "Not measured yet."
    tables.plot(frame(RUNS), tmp_path)
    assert not list(tmp_path.iterdir())
    one = [row for seed in range(5) for row in run("MeZO", 1e-3, seed, 0.6)]
    two = [row for seed in range(5) for row in run("MeZO", 1e-2, seed, 0.7)]
    other = [row for seed in range(2) for row in run("MeZO", 1e-1, seed, 0.7)]
    assert "0.001 (of 3" in tables.answer(frame(one + two + other), "methods", "layer", "full")
    # The second finalist lacks a seed.
    cut = frame(one + two[: -len(two) // 5] + other)
    assert tables.answer(cut, "methods", "layer", "full") == "Not measured yet."


@pytest.mark.usefixtures("two_seeds_and_one_finalist")
def test_a_table_has_the_chosen_lr_and_when_the_first_method_is_overtaken(tmp_path):
    table = tables.answer(frame(RUNS), "methods", "layer", "full").splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]
    assert [some[0] for some in cells] == ["AdaMeZO", "MeZO", "MEAZO"]
    # Two seeds that differ by 0.02 in both: the difference of the methods is 0.2 in each.
    assert cells[0][3] == "+0.200 (+0.200 to +0.200)"
    assert cells[0][4].startswith("974 ")  # (0.8 - 0.61) / (0.8 - 0.41) of 2,000
    assert cells[1][3:] == ["", "", "0.001 (of 2, at an edge)"]
    assert cells[2][4] == "never"
    assert tables.answer(frame(RUNS), "methods", "layer", "lora") == "Not measured yet."
    tables.plot(frame(RUNS), tmp_path)
    # The other questions that these methods are in have no answer of their own.
    assert {path.name for path in tmp_path.iterdir()} == {"evidence_methods.png"}
    assert "| layer, full | 8 | 16,000 | 0.0 |" in tables.spent(frame(RUNS))


@pytest.mark.usefixtures("two_seeds_and_one_finalist")
def test_a_seed_that_was_lost_is_not_left_out():
    lost = [*run("MeZO", 1e-3, 0, 0.6), *run("MeZO", 1e-3, 1, math.nan)]
    lost = [replace(r, median=math.inf) if r.metric == "validation loss" else r for r in lost]
    others = [row for row in RUNS if row.variant != "MeZO"]
    table = tables.answer(frame(others + lost), "methods", "layer", "full").splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == ["AdaMeZO", "MEAZO", "MeZO"]
    assert "a seed was lost" in table[-1]


@pytest.mark.usefixtures("two_seeds_and_one_finalist")
def test_a_run_that_ended_early_stays_where_it_was():
    early = [*run("MeZO", 1e-3, 0, 0.6), *run("MeZO", 1e-3, 1, 0.9, at=700)]
    curves = tables.curves_of(tables.runs_of(frame(early), "layer", "full", "MeZO")[0])
    assert curves.mean(axis=1).to_dict() == pytest.approx(
        {0: 0.8, 700: (0.8 + 0.9) / 2, 1000: (0.7 + 0.9) / 2, 2000: (0.6 + 0.9) / 2}
    )


@pytest.mark.usefixtures("two_seeds_and_one_finalist")
def test_what_a_wrong_lr_costs_is_over_all_options_and_shared_seeds():
    assert tables.wrong_lr(frame(RUNS)) == "Not measured yet."  # no lr within two places
    rows = [
        *run("MeZO", 1e-3, 0, 0.6), *run("MeZO", 1e-3, 1, 0.62), *run("MeZO", 1.78e-3, 0, 0.61),
        *run("MeZO", 3.16e-3, 0, 0.9), *run("MeZO", 3.16e-3, 1, 0.9), *run("MeZO", 1e-2, 0, 9.0),
        *run("MeZO, n = 4", 1e-2, 0, 0.5), *run("MeZO, n = 4", 1e-2, 1, 0.52),
        *run("MeZO, n = 4", 1.78e-2, 0, 0.54), *run("MeZO, n = 4", 3.16e-2, 0, 99.0),
    ]  # fmt: skip
    head, _, mezo, *others = tables.wrong_lr(frame(rows)).splitlines()
    assert re.findall("[0-9.]+", head) == ["0.32", "0.56", "1.8", "3.2"]
    # 1.8 times the best has the first seed alone, and so has 3.2 times of n = 4.
    assert mezo.endswith("| 0.03 (0.01 to 0.04; of 2) | 49.40 (0.29 to over 10; of 2) |")
    assert [line.split()[1] for line in others] == ["AdaMeZO", "FZOO"]
