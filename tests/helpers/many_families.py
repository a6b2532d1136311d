"""Tiny models of many families of transformers, and a loss for each row of their outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([1, 0, 1])
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))

_SMALL = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
_GROUPED = dict(_SMALL, intermediate_size=24, num_key_value_heads=2)
_GPT = dict(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=64)
_SEQ2SEQ = dict(
    vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
)  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": _GPT,
    "GPTJForCausalLM": dict(_GPT, rotary_dim=4),
    "GPTNeoXForCausalLM": dict(_SMALL, intermediate_size=24),
    "LlamaForCausalLM": _GROUPED,
    "MistralForCausalLM": _GROUPED,
    "Qwen2ForCausalLM": _GROUPED,
    "Gemma2ForCausalLM": dict(_GROUPED, head_dim=4),
    "OPTForCausalLM": dict(
        _SMALL, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64
    ),
    "PhiForCausalLM": dict(_SMALL, intermediate_size=24),
    "BloomForCausalLM": dict(vocab_size=60, hidden_size=16, n_layer=2, n_head=4),
    "FalconForCausalLM": _SMALL,
    "BertForSequenceClassification": dict(_SMALL, intermediate_size=24),
    "RobertaForSequenceClassification": dict(
        _SMALL, intermediate_size=24, max_position_embeddings=64
    ),
    "DistilBertForSequenceClassification": dict(
        vocab_size=60, dim=16, n_layers=2, n_heads=4, hidden_dim=24
    ),
    "DebertaV2ForSequenceClassification": dict(_SMALL, intermediate_size=24),
    "ElectraForSequenceClassification": dict(_SMALL, intermediate_size=24, embedding_size=16),
    "BartForConditionalGeneration": _SEQ2SEQ,
    "ViTForImageClassification": dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        image_size=16, patch_size=8,
    ),
}  # fmt: skip


def build(name: str, **more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.config_class(**FAMILIES[name], **more)).eval()


def losses(model: nn.Module, batch: Any) -> Tensor:
    """The loss of each block of a batch of perturbations."""
    if "Image" in type(model).__name__:
        logits = model(pixel_values=batch.repeat(IMAGES)).logits
    elif "Conditional" in type(model).__name__:
        ids = batch.repeat(IDS)
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
    else:
        logits = model(input_ids=batch.repeat(IDS)).logits
    if logits.dim() == 2:
        return batch.mean(F.cross_entropy(logits, batch.repeat(LABELS), reduction="none"))
    next_ids = batch.repeat(IDS)[:, 1:]
    return batch.mean(
        F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), next_ids, reduction="none")
    )
