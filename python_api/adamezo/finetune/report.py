"""Results of a run: plain numbers, text for the terminal, a JSON file and a PNG of the curves."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .options import Options
from .task import Evaluation, Task


@dataclass
class Training:
    """Measurements of the training steps; ``seconds`` is the time of the steps alone."""

    memory_kind: str
    forward_peak: int | None
    step_peak: int | None = None
    forward_passes: int = 0
    forward_seconds: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out_curve: list[dict[str, float]] = field(default_factory=list)


def numbers(
    options: Options,
    model: nn.Module,
    trained_texts: int,
    test: Task,
    before: Evaluation,
    after: Evaluation,
    training: Training,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The report of a run as plain values, ready for JSON."""
    device, labels = test.scorer.model.device, test.scorer.labels
    taken = len(training.curve)
    optimizer_seconds = training.seconds - training.forward_seconds
    peaks = training.step_peak, training.forward_peak
    start, end = {"step": 0} | before.summary(), {"step": options.steps} | after.summary()
    return {
        "options": asdict(options),
        "versions": _versions(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "data": {
            "training": trained_texts,
            "held_out": len(test),
            "labels": {label: int((test.targets == i).sum()) for i, label in enumerate(labels)},
        },
        "before": before.summary(),
        "after": after.summary(),
        "change": {
            "loss": _difference(before.losses, after.losses),
            "accuracy": _difference(before.right, after.right),
        },
        "training": {
            "steps": options.steps,
            "replayed": options.steps - taken,
            "forward_passes": training.forward_passes,
            "seconds": training.seconds,
            "seconds_per_step": training.seconds / max(taken, 1),
            "optimizer_seconds_per_step": optimizer_seconds / max(taken, 1),
            "optimizer_share": 1 - training.forward_seconds / training.seconds if taken else 0.0,
        },
        "memory": {
            "kind": training.memory_kind,
            "bare_forward_peak_bytes": training.forward_peak,
            "step_peak_bytes": training.step_peak,
            "step_over_forward": peaks[0] / peaks[1] if peaks[0] and peaks[1] else None,
        },
        "seconds": seconds,
        "curve": training.curve,
        "held_out_curve": [start, *training.held_out_curve, end],
        "examples": _answers(test, before, after, options.show),
    }


def _difference(before: Tensor, after: Tensor) -> dict[str, float]:
    """Mean change over the held-out examples, and its standard error from paired differences."""
    change = (after - before).double()
    return {
        "mean": change.mean().item(),
        "standard_error": change.std().item() / len(change) ** 0.5,
    }


def _answers(test: Task, before: Evaluation, after: Evaluation, count: int) -> list[dict[str, Any]]:
    """The model's answers to the first held-out examples, whose order is random (split)."""

    def answer(evaluation: Evaluation, row: int) -> dict[str, Any]:
        probabilities = evaluation.scores[row].softmax(dim=0)
        best = int(probabilities.argmax())
        return {"label": test.scorer.labels[best], "probability": probabilities[best].item()}

    return [
        example._asdict() | {"before": answer(before, row), "after": answer(after, row)}
        for row, example in enumerate(test.examples[:count])
    ]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("adamezo", "torch", "transformers", "tokenizers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def text(report: dict[str, Any]) -> str:
    """The report as text that fits a screen."""
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
    """Writes ``report.json`` and ``curves.png`` into ``folder`` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    file, curves = folder / "report.json", folder / "curves.png"
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _plot(report, curves)
    return file, curves


def _plot(report: dict[str, Any], path: Path) -> None:
    """Draws the training loss of each step, and the held-out loss and accuracy."""
    from matplotlib.figure import Figure  # unlike pyplot, needs no display and has no global state

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
