"""The long runs' protocol, references and tables (benchmarks/evidence.py), on small stand-ins."""

from __future__ import annotations

import math

import pandas
import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import evidence, methods
from benchmarks.method_jobs import Probed
from benchmarks.render import evidence as tables
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
    assert tables.reached(curve, 0.9) == 5
    assert tables.reached(curve, 0.5) == 17.5
    assert tables.reached(curve, 1.5) == 0
    assert tables.reached(curve, 0.3) == math.inf


def test_an_interval_holds_the_mean_and_is_narrower_than_the_seeds():
    values = [0.41, 0.44, 0.42, 0.47, 0.40]
    low, high = tables.interval(values)
    assert min(values) < low < sum(values) / 5 < high < max(values)
    assert tables.interval([0.3] * 5) == (0.3, 0.3)


def test_every_question_has_methods_of_other_names_and_says_what_differs():
    for entries in evidence.QUESTIONS.values():
        names = [entry.name for entry in entries]
        assert len(set(names)) == len(names)
    of_h = evidence.HORIZONS[5]
    assert (of_h.of, of_h.options(None)) == ("AdaMeZO", {"horizon": 5})


def run(name: str, lr: float, seed: int, end: float) -> list[Row]:
    columns = settings(job="layer", mode="full", budget=2000, lr=lr, seed=seed, threads=1)
    rows = [("validation loss", 2000, end), ("test accuracy", 2000, 0.8), ("time", 2000, 20.0)]
    rows += [("test loss", at, 0.8 + (end - 0.8) * at / 2000) for at in (0, 1000, 2000)]
    return [
        Row("evidence", metric, "1", name, columns, "forwards", at, value, repeats=1)
        for metric, at, value in rows
    ]


def test_a_table_has_the_chosen_lr_and_when_the_first_method_is_overtaken(monkeypatch, tmp_path):
    rows = [
        *run("MeZO", 1e-3, 0, 0.6), *run("MeZO", 1e-3, 1, 0.6), *run("MeZO", 1e-2, 0, 0.7),
        *run("MeZO", 1e-2, 1, 0.7), *run("AdaMeZO", 1e-3, 0, 0.4), *run("AdaMeZO", 1e-3, 1, 0.4),
        *run("MEAZO", 1e-3, 0, 0.7), *run("MEAZO", 1e-3, 1, 0.7),
    ]  # fmt: skip
    assert tables.answer(frame(rows), "methods", "layer", "full") == "Not measured yet."
    tables.plot(frame(rows), tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tables, "SEEDS", range(2))
    table = tables.answer(frame(rows), "methods", "layer", "full").splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in table] == ["AdaMeZO", "MeZO", "MEAZO"]
    assert "1,000" in table[0]
    assert "2,000" in table[1]
    assert "0.001 (of 2, at an edge)" in table[1]
    assert "not reached" in table[2]
    assert tables.answer(frame(rows), "methods", "layer", "lora") == "Not measured yet."
    tables.plot(frame(rows), tmp_path)
    # The other questions that these methods are in have no answer of their own.
    assert {path.name for path in tmp_path.iterdir()} == {"evidence_methods.png"}
    assert "| layer, full | 8 | 16,000 | 0.0 |" in tables.spent(frame(rows))
