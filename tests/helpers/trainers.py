"""The real Trainer of transformers on a tiny model: rows, collator and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from adamezo.integrations import ZOTrainer
from helpers import families


def rows(count: int = 40) -> list[dict[str, list[int]]]:
    """Token rows of 5 to 9 tokens; the first two are a prompt, which has no labels."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(4, families.VOCABULARY, (5 + i % 5,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in batch])

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"]))
                         for r in batch])  # fmt: skip
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def arguments(folder: Any, kind: type = TrainingArguments, **changed: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=20, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=5, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    return kind(**(settings | changed))


def trainer(folder: Any, model: Any = None, kind: Any = ZOTrainer, **changed: Any) -> Any:
    """A trainer; what is not one of its own arguments goes to the TrainingArguments."""
    own = ("optimizer_cls_and_kwargs", "optimizers", "callbacks", "objective", "step_log",
           "max_projected_grad", "train_mode", "processing_class", "eval_dataset",
           "compute_loss_func", "compute_metrics", "model_init", "data_collator",
           "train_dataset")  # fmt: skip
    given = {name: changed.pop(name) for name in own if name in changed}
    if "model_init" not in given:
        given["model"] = families.make("llama") if model is None else model
    settings = {"data_collator": collate, "train_dataset": rows(), **given}
    return kind(args=arguments(folder, **changed), **settings)


def loader(folder: Any, model: Any = None, **changed: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of the Trainer itself, over and over."""
    plain = trainer(folder, model, kind=Trainer, **changed)
    return itertools.chain.from_iterable(itertools.repeat(plain.get_train_dataloader()))


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
