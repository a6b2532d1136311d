"""Arguments of the command line for a short run on the CPU."""

from __future__ import annotations


def arguments(model_folder, data_file, output, **changed) -> list[str]:
    settings = {
        "model": model_folder, "data": data_file, "held-out": 10, "steps": 4, "batch-size": 4,
        "lr": 1e-3, "device": "cpu", "output": output,
    }  # fmt: skip
    settings |= {name.replace("_", "-"): value for name, value in changed.items()}
    given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["finetune", *given, "--label-words", "negative=terrible", "positive=great"]
