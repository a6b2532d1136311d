"""What a fine-tuning run says at its end: text for the terminal, numbers as JSON, curves as PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def text(report: dict[str, Any]) -> str:
    """The report of :func:`adamezo.finetune.finetune` in a screenful."""
    before, after, change = report["before"], report["after"], report["change"]
    training, memory = report["training"], report["memory"]
    lines = [
        f"{report['model']['class']}, {report['model']['trained'] / 1e6:.1f}M weights trained, on "
        f"{report['device']}; {report['data']['training']} training and "
        f"{report['data']['held_out']} held-out texts",
        "",
        "held-out      before   after    change (standard error over the texts)",
    ]
    for name in ("loss", "accuracy"):
        lines.append(
            f"  {name:<10}{before[name]:8.3f}{after[name]:8.3f}  {change[name]['mean']:+8.3f} "
            f"({change[name]['standard_error']:.3f})"
        )
    lines += [
        "",
        f"{training['steps']} steps, {training['forward_passes']} forward passes, no backward "
        f"pass; {training['seconds_per_step']:.2f} s a step, of which the optimizer "
        f"{training['optimizer_seconds_per_step']:.2f} s ({training['optimizer_share']:.0%})",
    ]
    if memory["step_over_forward"]:
        lines.append(
            f"peak memory ({memory['kind']}): {memory['step_peak_bytes'] / 2**20:.0f} MiB a step, "
            f"{memory['bare_forward_peak_bytes'] / 2**20:.0f} MiB a bare forward pass "
            f"({memory['step_over_forward']:.3f} times)"
        )
    else:
        lines.append("peak memory: not measured (the system cannot reset its peak counter)")
    lines.append("")
    for example in report["examples"]:
        lines.append(f"  {example['text']}")
        answers = [
            f"{when} {example[when]['label']} ({example[when]['probability']:.2f})"
            for when in ("before", "after")
        ]
        lines.append(f"    people: {example['label']}; the model {', '.join(answers)}")
    return "\n".join(lines)


def write(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``curves.png`` into ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, curves = folder / "report.json", folder / "curves.png"
    numbers.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _plot(report, curves)
    return numbers, curves


def _plot(report: dict[str, Any], path: Path) -> None:
    """Training loss of each step, and held-out loss and accuracy where they were measured."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    steps = [point["step"] for point in report["curve"]]
    losses = [point["loss"] for point in report["curve"]]
    window = max(1, len(losses) // 10)
    mean = [
        sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]
    held_out = report["held_out_curve"]
    at = [point["step"] for point in held_out]

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, losses, color="0.8", label="a batch")
    left.plot(steps, mean, color="C0", label=f"mean of the last {window}")
    left.plot(at, [point["loss"] for point in held_out], "o-", color="C3", label="held-out")
    left.set(xlabel="step (two forward passes)", ylabel="loss (nats)")
    left.legend()
    right.plot(at, [point["accuracy"] for point in held_out], "o-", color="C3")
    right.set(xlabel="step (two forward passes)", ylabel="held-out accuracy")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
