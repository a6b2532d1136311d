"""Models of transformers: loading, saving, scoring label words, and losses in a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..engine.batched import PerturbedBatch

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "adamezo.integrations.transformers needs the transformers package: "
        "pip install 'adamezo[transformers]'"
    ) from error


def without_bars() -> None:
    """Loading shows no bars from now on: in a file they are hundreds of lines."""
    transformers.utils.logging.disable_progress_bar()


def load(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from this machine.

    ``path`` is a folder written by ``save_pretrained``, or a ``.gguf`` file. A GGUF file's weights
    are turned into plain tensors of ``dtype``: quantised ones keep the rounding that they had.
    Returns ``(model, tokenizer)``, the model in evaluation mode on ``device``.
    """
    path = Path(path).expanduser()
    options: dict[str, Any] = {"local_files_only": True}
    if path.is_dir():
        folder = path
    elif path.is_file() and path.suffix == ".gguf":
        folder = path.parent
        options["gguf_file"] = path.name
    else:
        raise FileNotFoundError(
            f"--model: got {str(path)!r}, expected a folder with a transformers model or a .gguf "
            "file on this machine; names on a hub are not looked up, so download the model first: "
            f"hf download {path} --local-dir FOLDER"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    if "gguf_file" in options:
        # Without this, transformers may keep the blocks packed (no float weights to train), and
        # marks the model as quantised, which save_pretrained then refuses.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if hasattr(model.config, "quantization_config"):
        raise ValueError(
            f"{path}: the weights are quantised ({model.config.quantization_config}), expected "
            "floating-point weights; save a dequantised copy of the model first"
        )
    return model.to(device).eval(), tokenizer


def from_config(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model of a config, with weights of random numbers, in evaluation mode.

    ``path`` is a folder with a config.json, such a file, or a ``.gguf`` file, whose weights are not
    read.
    """
    path = Path(path).expanduser()
    options: dict[str, Any] = {"local_files_only": True}
    if path.suffix == ".gguf" and path.is_file():
        options["gguf_file"] = path.name
        path = path.parent
    elif not (path / "config.json" if path.is_dir() else path).is_file():
        raise FileNotFoundError(
            f"MODEL: got {str(path)!r}, expected a folder with a config.json, such a file, or a "
            ".gguf file, on this machine; names on a hub are not looked up"
        )
    config = transformers.AutoConfig.from_pretrained(path, **options)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write model and tokenizer to ``folder``, readable by :func:`load`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Inputs:
    """Batches of token ids as a causal language model takes them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keeps = "logits_to_keep" in accepted
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}

    def logits(self, texts: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Logits at the last ``keep`` positions of texts, of shape (texts, keep, vocabulary).

        Texts are padded on the left, so that every one ends at the last position. With fewer than
        ``keep`` positions there are that many.
        """
        length = max(len(ids) for ids in texts)
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(texts):
            tokens[row, length - len(ids) :] = torch.tensor(ids)
            mask[row, length - len(ids) :] = 1
        return self.of_tokens(tokens, mask, keep)

    def of_tokens(self, tokens: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        """The same of tokens of shape (texts, length), padded where the mask is 0."""
        device = self._model.device
        inputs = {"input_ids": tokens.to(device)}
        if mask is not None:
            inputs["attention_mask"] = mask.to(device)
            if self._takes_positions:
                inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0).to(device)
        if self._keeps:  # the vocabulary's logits at these positions, not at all
            self._extra["logits_to_keep"] = keep
        logits: Tensor = self._model(**inputs, **self._extra).logits
        return logits[:, -keep:]


class SeveralTokens(ValueError):
    """A label's word is not one token behind the prompt."""


class LabelScorer:
    """Scores a text by the logits that a language model gives to one word for each label.

    ``template`` holds ``{text}`` and ends with ``{label}``; ``label_words`` maps each label to the
    word that stands there. Each word must be one token, so that one forward pass scores them all
    (the way MeZO, arXiv 2305.17333, turns classification into language modelling).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str,
        label_words: Mapping[str, str],
        *,
        max_tokens: int = 256,
    ) -> None:
        if template.count("{text}") != 1 or not template.endswith("{label}"):
            raise ValueError(
                f"template: got {template!r}, expected {{text}} once and {{label}} at the end, "
                "for example '{text} It was {label}'"
            )
        if len(label_words) < 2:
            raise ValueError(f"label words: got {dict(label_words)}, expected at least two labels")
        before = template[: -len("{label}")]
        # The space before a word belongs to the word's token in the usual vocabularies.
        self._prompt = before.rstrip(" ")
        space = before[len(self._prompt) :]
        self.model = model
        self.tokenizer = tokenizer
        self.labels = tuple(label_words)
        self.max_tokens = max_tokens
        self.token_ids = [self._token(space + word) for word in label_words.values()]
        if len(set(self.token_ids)) < len(self.token_ids):
            raise ValueError(
                f"label words: got {dict(label_words)}, where two share a token; "
                "expected a different word for each label"
            )
        self._inputs = Inputs(model)

    def _token(self, word: str) -> int:
        # Tokenized behind the prompt, because some tokenizers treat the start of a text apart.
        context = self._prompt.replace("{text}", "text")
        before = self.tokenizer(context).input_ids
        after = self.tokenizer(context + word).input_ids
        if len(after) != len(before) + 1 or after[:-1] != before:
            raise SeveralTokens(
                f"label word {word.strip()!r}: got the tokens "
                f"{self.tokenizer.tokenize(word)} behind the prompt, expected exactly one; "
                "choose a commoner word with --label-words LABEL=WORD"
            )
        if after[-1] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"label word {word.strip()!r}: it is not in the model's vocabulary; choose another "
                "with --label-words LABEL=WORD"
            )
        return int(after[-1])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the prompts; of one longer than ``max_tokens`` the end is kept."""
        prompts = [self._prompt.replace("{text}", text) for text in texts]
        return [ids[-self.max_tokens :] for ids in self.tokenizer(prompts).input_ids]

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Scores of a batch of encoded prompts: float32, ``(len(prompts), len(labels))``."""
        logits = self._inputs.logits(prompts, 1)[:, -1]
        return logits[:, self.token_ids].float()


def losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    batch: PerturbedBatch,
    *,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The loss of a model for each perturbation of a batch, for closures of
    :func:`adamezo.batched`::

        @adamezo.batched
        def closure(batch):
            return losses(model, inputs, batch)

    The model computes its own loss, of one perturbation's rows at a time: tokens are shifted,
    ignored (-100) and weighted as in a forward of these rows alone, for any kind of head whose loss
    comes from torch's loss functions.

    Args:
        model: whose outputs have a ``loss``.
        inputs: what the model takes, ``labels`` among them, for one perturbation.
        batch: of the closure.
        num_items_in_batch: by what a sum of losses is divided, in place of a mean, as
            ``transformers.Trainer`` counts it: the labels of all batches whose losses are added up.

    Returns:
        Of shape (batch.count,).

    Raises:
        ValueError: the model has returned no loss, or none for each perturbation.
    """
    given = dict(inputs)
    accepted = inspect.signature(model.forward).parameters
    if num_items_in_batch is not None:
        if all(p.kind is not p.VAR_KEYWORD for p in accepted.values()) and (
            "num_items_in_batch" not in accepted
        ):
            raise ValueError(
                f"{type(model).__name__} takes no num_items_in_batch, as its loss is always a "
                "mean: leave it out"
            )
        given["num_items_in_batch"] = num_items_in_batch
    if "use_cache" in accepted:
        given.setdefault("use_cache", False)
    if batch.count == 1:
        outputs = model(**batch.repeat(given))
    else:
        with _ByBlocks(batch.count):
            outputs = model(**batch.repeat(given))
    loss = outputs["loss"] if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} has returned no loss: expected inputs with the labels from "
            f"which it computes one, got {', '.join(sorted(inputs))}"
        )
    if batch.count == 1:
        return loss.reshape(1)
    if getattr(outputs, "aux_loss", None) is not None:
        raise ValueError(
            f"{type(model).__name__} adds an auxiliary loss over all rows of a batch "
            "(output_router_logits): set `model.config.output_router_logits = False`, or pass a "
            "closure that is not batched"
        )
    if loss.shape != (batch.count,):
        raise ValueError(
            f"{type(model).__name__} does not compute its loss by torch's loss functions, or "
            f"reduces it further: expected a loss for each of {batch.count} perturbations, got "
            f"shape {tuple(loss.shape)}. Compute it from the logits by `batch.mean`, or pass a "
            "closure that is not batched"
        )
    return loss


class _ByBlocks(TorchFunctionMode):
    """Loss functions give a loss for each block of rows, of shape (count,), each as if alone."""

    _LOSSES = (
        F.cross_entropy,
        F.nll_loss,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
    )

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function not in self._LOSSES or kwargs.get("reduction") == "none":
            return function(*args, **kwargs)
        names = ("input", "target")
        both = [args[i] if i < len(args) else kwargs.pop(name) for i, name in enumerate(names)]
        for tensor in both:
            if tensor.dim() == 0 or tensor.shape[0] % self._count:
                raise ValueError(
                    f"{function.__name__} of shape {tuple(tensor.shape)}, whose rows are no batch "
                    f"of {self._count} perturbations: pass a closure that is not batched"
                )
        pairs = zip(*(tensor.unflatten(0, (self._count, -1)) for tensor in both), strict=True)
        return torch.stack([function(*pair, *args[2:], **kwargs) for pair in pairs])
