"""The demo with three seeds: held-out loss and accuracy before and after, their mean and spread.

python -m examples.three_seeds                     # FZOO, the demo's settings
python -m examples.three_seeds --method adamezo    # another method, as many forward passes
python -m examples.three_seeds --plot              # the picture again, from the results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from adamezo.finetune import finetune
from adamezo.plots import PALETTE, figure, save
from examples.demo import METHODS, options

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit of the source tree, with "+changes" where files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    return (git("rev-parse", "HEAD") or "unknown") + ("+changes" if git("status", "-s") else "")


def spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.mean(values),
        "standard_deviation": statistics.stdev(values),
        "lowest": min(values),
        "highest": max(values),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Batch losses (means of some steps), held-out loss and accuracy, a line for each seed."""
    made, (left, right) = figure(2, width=4.5)
    for color, run in zip(PALETTE, result["runs"], strict=False):
        seed, held_out = run["options"]["seed"], run["held_out_curve"]
        losses = [point["loss"] for point in run["curve"]]
        each = run["training"]["forward_passes"] // len(losses)
        some = max(2, 20 // each)  # of some twenty forward passes
        recent = [statistics.mean(losses[max(0, i + 1 - some) : i + 1]) for i in range(len(losses))]
        at = [each * point["step"] for point in held_out]
        left.plot([each * (i + 1) for i in range(len(recent))], recent, color=color, alpha=0.35)
        left.plot(at, [p["loss"] for p in held_out], "o-", color=color, label=f"seed {seed}")
        right.plot(at, [p["accuracy"] for p in held_out], "o-", color=color)
    left.set(xlabel="forward passes", ylabel="loss (nats); pale: training batches")
    right.set(xlabel="forward passes", ylabel="held-out accuracy")
    left.legend()
    save(made, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="fzoo")
    parser.add_argument("--steps", type=int, help="other than the demo's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    chosen = parser.parse_args()
    target = RESULTS / f"three_seeds_{chosen.method}.json"
    if chosen.plot:
        plot(json.loads(target.read_text(encoding="utf-8")), target.with_suffix(".png"))
        return
    changed = {} if chosen.steps is None else {"steps": chosen.steps}

    runs: list[dict[str, Any]] = []
    for seed in chosen.seeds:
        report = finetune(options(chosen.method, seed=seed, show=0, **changed))
        # The path is this machine's; the demo checks the file's hash.
        report["options"]["model"] = Path(report["options"]["model"]).name
        report["options"]["data"] = Path(report["options"]["data"]).name
        runs.append(report)
        print(
            f"seed {seed}: loss {report['before']['loss']:.4f} -> {report['after']['loss']:.4f}, "
            f"accuracy {report['before']['accuracy']:.4f} -> {report['after']['accuracy']:.4f}",
            flush=True,
        )
    result = {
        "command": "python -m examples.three_seeds " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "before": runs[0]["before"],
        "after": {
            name: spread([run["after"][name] for run in runs]) for name in ("loss", "accuracy")
        },
        "seconds_per_step": spread([run["training"]["seconds_per_step"] for run in runs]),
        "optimizer_share": spread([run["training"]["optimizer_share"] for run in runs]),
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name in ("loss", "accuracy"):
        after = result["after"][name]
        print(
            f"held-out {name}: {result['before'][name]:.4f} before; after, over {len(runs)} seeds: "
            f"mean {after['mean']:.4f}, standard deviation {after['standard_deviation']:.4f}, "
            f"from {after['lowest']:.4f} to {after['highest']:.4f}"
        )
    plot(result, target.with_suffix(".png"))
    print(f"written: {target} and a picture beside it")


if __name__ == "__main__":
    main()
