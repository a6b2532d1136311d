"""Results of a run: plain numbers, text for the terminal, a JSON file and a PNG of the curves."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.optimizer import ZerothOrder
from ..plots import PALE, PALETTE, figure, save
from . import launch
from .options import Options
from .tasks import Evaluation, Task


@dataclass
class Training:
    """Measurements of the training steps; ``seconds`` is the time of the steps alone."""

    memory_kind: str
    forward_peak: int | None
    step_peak: int | None = None
    forward_passes: int = 0
    finding_forwards: int = 0
    """Forward passes that found the lr, before the first step."""
    forward_seconds: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out_curve: list[dict[str, float]] = field(default_factory=list)


def numbers(
    options: Options,
    optimizer: ZerothOrder,
    model: nn.Module,
    train: Task,
    test: Task,
    before: Evaluation,
    after: Evaluation,
    answers: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    training: Training,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The report of a run as plain values, ready for JSON.

    Args:
        options: of the run, with what it took where they left it open.
        optimizer, model: after training.
        train, test: the rows trained on, and the held-out ones.
        before, after: measurements of the held-out rows.
        answers: to the first held-out rows, before and after.
        training: measurements of the steps.
        seconds: what else took time.
    """
    taken = len(training.curve)
    optimizer_seconds = training.seconds - training.forward_seconds
    peaks = training.step_peak, training.forward_peak
    start, end = {"step": 0} | before.summary(), {"step": options.steps} | after.summary()
    shortened = train.shortened + test.shortened
    return {
        "options": asdict(options),
        "versions": _versions(),
        "device": _device_name(test.model.device),
        "threads": torch.get_num_threads(),
        "processes": launch.size(),
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "data": {
            "training": len(train),
            "held_out": len(test),
            **test.describe(),
            **({"shortened": shortened} if shortened else {}),
        },
        "accuracy_of": test.unit,
        "before": before.summary(),
        "after": after.summary(),
        "change": {
            "loss": _difference(before.losses, after.losses, after.weights),
            "accuracy": _difference(before.right, after.right, after.weights),
        },
        "training": {
            "steps": options.steps,
            "replayed": options.steps - taken,
            "skipped": int(optimizer.skipped),
            "forward_passes": training.forward_passes,
            "forward_passes_to_find_lr": training.finding_forwards,
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
        "examples": [
            test.question(row) | {"before": first, "after": last}
            for row, (first, last) in enumerate(answers)
        ],
    }


def _difference(before: Tensor, after: Tensor, weights: Tensor) -> dict[str, float | None]:
    """Mean change over the held-out examples, and its standard error from paired differences.

    The error is that of a ratio of sums over the examples, which without weights is the usual one
    of a mean. A single example has none.
    """
    change, weights = (after - before).double(), weights.double()
    mean = (change * weights).sum() / weights.sum()
    count = len(change)
    spread = ((change - mean) * weights).norm() / weights.sum()
    error = spread.item() * (count / (count - 1)) ** 0.5 if count > 1 else None
    return {"mean": mean.item(), "standard_error": error}


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
    training, memory, data = report["training"], report["memory"], report["data"]
    lines = [
        f"{report['model']['class']}, {report['model']['trained'] / 1e6:.1f}M weights trained by "
        f"{report['options']['method']}, on {report['device']}; {data['training']} training and "
        f"{data['held_out']} held-out texts",
        "",
        "held-out      before   after    change (standard error over the texts)",
    ]
    for name in ("loss", "accuracy"):
        error = change[name]["standard_error"]
        lines.append(
            f"  {name:<10}{before[name]:8.3f}{after[name]:8.3f}  {change[name]['mean']:+8.3f} "
            f"({'-' if error is None else format(error, '.3f')})"
        )
    if report["accuracy_of"] == "tokens":
        lines.append("  (of tokens: accuracy is the share that the model finds likeliest)")
    if data.get("shortened"):
        lines.append(f"  {data['shortened']} texts were shortened to --max-tokens")
    if training["skipped"]:
        lines.append(f"  {training['skipped']} steps were skipped, as their loss was not finite")
    finding = training["forward_passes_to_find_lr"]
    found = f" and {finding} to find the lr" if finding else ""
    lines += [
        "",
        f"{training['steps']} steps, {training['forward_passes']} forward passes{found}, no "
        f"backward pass; {training['seconds_per_step']:.2f} s a step, of which the optimizer "
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
        lines += _shown(example)
    return "\n".join(lines)


def _shown(example: dict[str, Any]) -> list[str]:
    """An example with the model's answers, as lines."""
    lines = [f"  {_line(example['text'])}"]
    if "label" in example["before"]:
        answers = [
            f"{when} {example[when]['label']} ({example[when]['probability']:.2f})"
            for when in ("before", "after")
        ]
        return [*lines, f"    people: {example['label']}; the model {', '.join(answers)}"]
    texts = {"data": example["label"]} | {
        when: example[when]["text"] for when in ("before", "after")
    }
    return [*lines, *(f"    {name:<7} {_line(text)}" for name, text in texts.items())]


def _line(text: str, most: int = 200) -> str:
    """A text as one line that is not too long."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def write(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes ``report.json`` and ``curves.png`` into ``folder`` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    file, curves = folder / "report.json", folder / "curves.png"
    content = json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(content + "\n", encoding="utf-8")
    _plot(report, curves)
    return file, curves


def _finite(value: Any) -> Any:
    """The same, with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plot(report: dict[str, Any], path: Path) -> None:
    """Draws the training loss of each step, and the held-out loss and accuracy."""
    steps = [point["step"] for point in report["curve"]]
    losses = [point["loss"] for point in report["curve"]]
    window = max(1, len(losses) // 10)
    mean = [
        sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]
    held_out = report["held_out_curve"]
    at = [point["step"] for point in held_out]

    made, (left, right) = figure(2, width=4.5)
    left.plot(steps, losses, color=PALE, label="a batch")
    left.plot(steps, mean, color=PALETTE[0], label=f"mean of the last {window}")
    left.plot(at, [point["loss"] for point in held_out], "o-", color=PALETTE[1], label="held-out")
    left.set(xlabel="step", ylabel="loss (nats)")
    left.legend()
    right.plot(at, [point["accuracy"] for point in held_out], "o-", color=PALETTE[1])
    right.set(xlabel="step", ylabel=f"held-out accuracy, share of {report['accuracy_of']}")
    save(made, path)
