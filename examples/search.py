"""The search behind the demo's settings: short runs, compared on rows that the demo trains on.

    python -m examples.search            # every trial; appends to examples/results/search.csv
    python -m examples.search a-1e-3     # some of them

The demo's 600 held-out reviews take no part: 200 of the other reviews measure, the rest train.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

from adamezo.finetune import finetune, read_examples, split
from examples.demo import HELD_OUT, REVIEWS, options

RESULTS = Path(__file__).parent / "results" / "search.csv"
COLUMNS = [
    "trial", "method", "steps", "batch_size", "lr", "lr_schedule", "normalization", "zo_eps",
    "horizon", "seed", "template", "loss_before", "accuracy_before", "loss_at_40", "accuracy_at_40",
    "loss_after", "accuracy_after", "forward_passes",
]  # fmt: skip
"""The loss at 40 is the one after 80 forward passes, which are 9 steps of FZOO."""

# 40 steps at a constant rate unless said; then the demo's 120 steps with a rate that falls to zero.
TRIALS: dict[str, dict[str, Any]] = {
    "a-3e-4": {"lr": 3e-4},
    "a-1e-3": {"lr": 1e-3},
    "a-2e-3": {"lr": 2e-3},
    "a-3e-4-it-was": {"lr": 3e-4, "template": "{text} It was {label}"},
    "m-1e-5": {"method": "mezo", "lr": 1e-5},
    "m-3e-5": {"method": "mezo", "lr": 3e-5},
    "m-6e-5": {"method": "mezo", "lr": 6e-5},
    "a-6e-4-linear": {"lr": 6e-4, "steps": 120, "lr_schedule": "linear"},
    "a-1e-3-linear": {"lr": 1e-3, "steps": 120, "lr_schedule": "linear"},
    "m-6e-5-linear": {"method": "mezo", "lr": 6e-5, "steps": 120, "lr_schedule": "linear"},
    "f-6e-7-linear": {"method": "fzoo", "lr": 6e-7, "steps": 26, "lr_schedule": "linear"},
    "f-1e-6-linear": {"method": "fzoo", "lr": 1e-6, "steps": 26, "lr_schedule": "linear"},
    "f-2e-6-linear": {"method": "fzoo", "lr": 2e-6, "steps": 26, "lr_schedule": "linear"},
}


def run(trial: str, data: Path) -> dict[str, Any]:
    """One row of the results."""
    changed = {"steps": 40, "method": "adamezo", "lr_schedule": "constant"} | TRIALS[trial]
    # Steps of nine forward passes, and of two.
    at, every = (9, 9) if changed["method"] == "fzoo" else (40, 20)
    report = finetune(options(**changed, data=str(data), held_out=200, eval_every=every))
    row = {name: value for name, value in report["options"].items() if name in COLUMNS}
    row |= {"trial": trial, "method": changed["method"]}
    row["template"] = row["template"].replace("\n", "\\n")
    row["forward_passes"] = report["training"]["forward_passes"]
    curve = report["held_out_curve"]
    at_40 = next(point for point in curve if point["step"] == at)
    for when, point in (("before", curve[0]), ("at_40", at_40), ("after", curve[-1])):
        row[f"loss_{when}"] = f"{point['loss']:.4f}"
        row[f"accuracy_{when}"] = f"{point['accuracy']:.4f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=", ".join(TRIALS))
    chosen = parser.parse_args().trials or list(TRIALS)
    unknown = set(chosen) - set(TRIALS)
    if unknown:
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(TRIALS)}")

    new = not RESULTS.exists()
    with tempfile.TemporaryDirectory() as folder, open(RESULTS, "a", newline="") as results:
        writer = csv.DictWriter(results, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        data = Path(folder) / "training_rows.csv"
        with open(data, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows(split(read_examples(REVIEWS), HELD_OUT)[0])
        for trial in chosen:
            row = run(trial, data)
            writer.writerow(row)
            results.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
