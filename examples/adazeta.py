"""AdaZeta on the demo's job: tensor-train adapters, and more directions a step as epochs pass.

    python -m examples.adazeta                       some minutes on two cores
    python -m examples.adazeta --lr 1e-4 --rows 2008 --epochs 20    the published recipe: many hours

The published run has lr 1e-4, zo_eps 1e-3, batches of 16, and a schedule with alpha 0.85, at most
15 directions and NUM 20, all of which but the lr are used here. Its lr is for thousands of steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from adamezo import AdaZeta, check_closure
from adamezo.adapters import adapt, adapters_of, save_adapters
from adamezo.finetune import Classification, read_examples, split
from adamezo.integrations import transformers as language_models
from examples.demo import options


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64, help="reviews to train on")
    parser.add_argument("--held-out", type=int, default=200, help="reviews to measure on")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-to", type=Path, help="folder for the adapters")
    chosen = parser.parse_args()

    job = options()
    model, tokenizer = language_models.load(job.model)
    scorer = language_models.LabelScorer(model, tokenizer, job.template, job.label_words)
    training, held_out = split(read_examples(job.data), job.held_out)
    train = Classification(scorer, training[: chosen.rows])
    test = Classification(scorer, held_out[: chosen.held_out])
    order = torch.Generator().manual_seed(chosen.seed)
    loader = DataLoader(
        range(len(train)), batch_size=16, shuffle=True, drop_last=True, generator=order
    )

    adapt(model, "tensor-train", seed=chosen.seed)
    adapters = adapters_of(model)
    schedule = AdaZeta.schedule(loader, chosen.epochs)
    optimizer = AdaZeta(adapters.items(), lr=chosen.lr, model=model, seed=chosen.seed, **schedule)
    trained = sum(p.numel() for p in adapters.values())
    print(f"{trained:,} weights are trained, of {sum(p.numel() for p in model.parameters()):,}")
    print("before:", test.evaluate(32).summary(), flush=True)
    for epoch in range(chosen.epochs):
        for number, rows in enumerate(loader):

            def closure(rows: torch.Tensor = rows) -> torch.Tensor:
                return train.loss(rows.tolist())

            if epoch == number == 0:
                check_closure(optimizer, closure)
            directions = optimizer.queries_at(epoch * len(loader), optimizer.param_groups[0])
            loss = optimizer.step(closure).item()
        print(f"epoch {epoch}: {directions} directions a step, last loss {loss:.3f}", flush=True)
    print("after:", test.evaluate(32).summary())
    if chosen.save_to:
        save_adapters(model, chosen.save_to)
        print(f"written: {chosen.save_to}")


if __name__ == "__main__":
    main()
