"""The jobs of benchmarks/methods.py: what is trained, on which rows, and how it is scored.

Both are the demo's (docs/main_job.md): its model, its reviews and its prompt. The demo's held-out
reviews are the test rows here; others are taken from its training rows for validation, in the same
way (adamezo.finetune.split).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from adamezo import PerturbedBatch
from adamezo.adapters import FAMILIES, adapt
from adamezo.finetune import Classification, Example, Options, read_examples, split
from adamezo.integrations import transformers as language_models
from benchmarks.products import in_bfloat16
from examples.demo import HELD_OUT, REVIEWS, options

# Where each mode but "full" trains adapters: as in a Llama model, as the last layer alone has no
# config that says so. They add nothing at first, so that a run starts at the untouched model.
PLACES: dict[str, Any] = {
    "lora": FAMILIES["llama"].beside,
    "tensor-train": FAMILIES["llama"].residual,
}


@dataclass
class Start:
    """A model before its first step."""

    module: nn.Module
    weights: list[nn.Parameter]
    """Those that are trained."""
    losses: Callable[[Sequence[int], PerturbedBatch], Tensor]
    """Of training rows, by number, for each perturbation of a batch."""
    score: Callable[[str], tuple[float, float]]
    """Mean loss and accuracy on the "validation" or the "test" rows."""

    def loss(self, rows: Sequence[int]) -> Tensor:
        return self.losses(rows, PerturbedBatch(1))[0]


class Job:
    """A model to train, and the rows that train and score it."""

    name: str
    batch: int
    rows: int
    """To train on."""
    points = 3
    """In how many equal parts of the budget the test rows are scored; it divides the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Forward passes of a run."""

    def start(self, mode: str, seed: int) -> Start:
        """The same model for the same mode (one of MODES) and seed."""
        raise NotImplementedError

    def probed(self, part: str) -> Probed | None:
        """What references are fitted to; None where there are none."""
        return None


class Probed(NamedTuple):
    """What an untouched model gives for rows: features of shape (rows, width), scores of shape
    (rows, classes), and the labels' numbers."""

    features: Tensor
    scores: Tensor
    labels: Tensor


def three_parts(validation: int) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training rows; validation and test rows by name."""
    training, test = split(read_examples(REVIEWS), HELD_OUT)
    training, held_out = split(training, validation)
    return training, {"validation": held_out, "test": test}


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


class LastLayer(nn.Module):
    """The last layer of a Llama model, its norm, and its scores of a few words as the next one, or
    of all words; with some of the layers before it, if asked for.

    Its input is what the layers before give, (rows, tokens, width), padded behind, and the places
    of the tokens whose next one is scored, (rows, places). After the keys and values it computes
    these tokens alone, which for one of them takes a tenth of the time.
    """

    def __init__(self, model: Any, words: Sequence[int] | None = None, before: int = 0) -> None:
        super().__init__()
        layers = model.model.layers
        self.before = copy.deepcopy(layers[len(layers) - 1 - before : -1])
        self.layer = copy.deepcopy(layers[-1])
        self.norm = copy.deepcopy(model.model.norm)
        every = model.lm_head.weight.detach()
        self.register_buffer("words", (every if words is None else every[list(words)]).clone())
        self._angles = model.model.rotary_emb  # without weights

    def forward(self, hidden: Tensor, places: Tensor) -> Tensor:
        return self.features(hidden, places) @ self.words.T

    def features(self, hidden: Tensor, places: Tensor) -> Tensor:
        """What scores are made of, (rows, places, width)."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate

        positions = torch.arange(hidden.shape[1])[None]
        angles = self._angles(hidden, positions)
        for layer in self.before:
            hidden = layer(hidden, position_embeddings=angles)
        attention, rows = self.layer.self_attn, torch.arange(len(hidden))[:, None]
        every = self.layer.input_layernorm(hidden)
        residual, scored = (states[rows, places] for states in (hidden, every))

        def heads(projection: nn.Module, states: Tensor) -> Tensor:
            return projection(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        query = heads(attention.q_proj, scored)
        key, value = heads(attention.k_proj, every), heads(attention.v_proj, every)
        key, _ = rotate(key, key, *angles)
        query, _ = rotate(query, query, *self._angles(hidden, places))
        mask = (positions[None] <= places[..., None])[:, None]
        mixed = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        residual = residual + attention.o_proj(mixed.transpose(1, 2).flatten(-2))
        residual = residual + self.layer.mlp(self.layer.post_attention_layernorm(residual))
        features: Tensor = self.norm(residual)
        return features


class Part(NamedTuple):
    """Rows as the last layer sees them: its input, the numbers of tokens, the labels' numbers."""

    hidden: Tensor
    lengths: Tensor
    labels: Tensor

    def batch(self, rows: Sequence[int] | Tensor) -> Part:
        lengths = self.lengths[rows]
        return Part(self.hidden[rows, : int(lengths.max())], lengths, self.labels[rows])


class Layer(Job):
    """The main job with its last layer trained alone: 3.5 of 134.5 million weights; or its last
    ones, or in another type. What the other layers give is computed once, which takes minutes.

    Several layers multiply in bfloat16 under autocast, which takes a third of the time where
    a processor has instructions for it. A layer in bfloat16 gives scores in bfloat16 too, as such a
    model does, or in float32 (``scores``).
    """

    def __init__(
        self,
        budget: int,
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        scores: torch.dtype | None = None,
    ) -> None:
        super().__init__(budget)
        self._before, self._dtype, self._scored_in = layers - 1, dtype, scores or dtype
        self.name = "layer" if layers == 1 else f"{layers} layers"
        if dtype != torch.float32:
            self.name += f" in {str(dtype)[6:]}"
        if self._scored_in != dtype:
            self.name += f", scores in {str(scores)[6:]}"
        settings = options()
        self._model, tokenizer = language_models.load(settings.model)
        scorer = language_models.LabelScorer(
            self._model, tokenizer, settings.template, settings.label_words
        )
        self._words = scorer.token_ids
        training, held_out = three_parts(400)
        parts = {"training": training, **held_out}
        self._parts = {name: self._hidden(scorer, some) for name, some in parts.items()}
        self.batch, self.rows = settings.batch_size, len(training)

    @torch.no_grad()
    def _hidden(self, scorer: Any, examples: Sequence[Example]) -> Part:
        prompts = scorer.encode([e.text for e in examples])
        lengths = torch.tensor([len(ids) for ids in prompts])
        hidden = torch.zeros(len(prompts), int(lengths.max()), self._model.config.hidden_size)
        for length in lengths.unique().tolist():  # so that nothing is padded
            for rows in (lengths == length).nonzero()[:, 0].split(16):
                ids = torch.tensor([prompts[row] for row in rows])
                states = self._model.model(ids, output_hidden_states=True, use_cache=False)
                # The input of the layers that are trained.
                hidden[rows, :length] = states.hidden_states[-2 - self._before]
        hidden = hidden.to(self._dtype)
        return Part(hidden, lengths, torch.tensor([scorer.labels.index(e.label) for e in examples]))

    def _untouched(self) -> LastLayer:
        return LastLayer(self._model, self._words, self._before).to(self._dtype).eval()

    @torch.no_grad()
    def probed(self, part: str) -> Probed:
        model, some = self._untouched().float(), self._parts[part]
        batches = [some.batch(rows) for rows in torch.arange(len(some.labels)).split(64)]
        features = [model.features(b.hidden.float(), b.lengths[:, None] - 1) for b in batches]
        x = torch.cat(features)[:, 0]
        return Probed(x, x @ model.words.T, some.labels)

    def _scores(self, model: LastLayer, hidden: Tensor, lengths: Tensor) -> Tensor:
        with in_bfloat16(enabled=self._before > 0):
            features = model.features(hidden, lengths[:, None] - 1)[:, 0]
        words = model.words.to(self._scored_in)
        return (features.to(self._scored_in) @ words.T).float()

    def start(self, mode: str, seed: int) -> Start:
        torch.manual_seed(seed)
        model = self._untouched()
        if mode != "full":
            adapt(model, mode, targets=PLACES[mode], seed=seed)

        def losses(rows: Sequence[int], batch: PerturbedBatch) -> Tensor:
            hidden, lengths, labels = batch.repeat(self._parts["training"].batch(rows))
            scores = self._scores(model, hidden, lengths)
            return batch.mean(cross_entropy(scores, labels, reduction="none"))

        @torch.no_grad()
        def score(part: str) -> tuple[float, float]:
            some = self._parts[part]
            total, right = 0.0, 0
            for rows in some.lengths.argsort(stable=True).split(64):
                hidden, lengths, labels = some.batch(rows)
                scores = self._scores(model, hidden, lengths)
                total += cross_entropy(scores, labels, reduction="sum").item()
                right += int((scores.argmax(dim=1) == labels).sum())
            return total / len(some.labels), right / len(some.labels)

        return Start(model, trained(model), losses, score)


class Main(Job):
    """The job of docs/main_job.md: SmolLM2-135M says "terrible" or "great". To score all of the
    demo's 600 held-out reviews would take as long as a run, so the first of them are scored."""

    name = "main"

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self._options: Options = options()
        self._model, self._tokenizer = language_models.load(self._options.model)
        self._training, self._held_out = three_parts(200)
        self._held_out["test"] = self._held_out["test"][:200]
        self.batch, self.rows = self._options.batch_size, len(self._training)

    def start(self, mode: str, seed: int) -> Start:
        torch.manual_seed(seed)
        model = copy.deepcopy(self._model)
        if mode != "full":
            adapt(model, mode, targets=PLACES[mode], seed=seed)
        scorer = language_models.LabelScorer(
            model, self._tokenizer, self._options.template, self._options.label_words
        )
        training = Classification(scorer, self._training)
        held_out = {name: Classification(scorer, some) for name, some in self._held_out.items()}

        def score(part: str) -> tuple[float, float]:
            found = held_out[part].evaluate(2 * self.batch).summary()
            return found["loss"], found["accuracy"]

        return Start(model, trained(model), training.losses, score)


JOBS: dict[str, Callable[[int], Job]] = {"layer": Layer, "main": Main}
