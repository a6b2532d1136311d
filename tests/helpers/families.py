"""Tiny models of each family that has published places for adapters, with real configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # the usual 0.02 would give next to equal logits
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def qwen2() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=6))


def opt() -> OPTForCausalLM:
    sizes = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "initializer_range")}
    config = OPTConfig(
        **sizes, ffn_dim=40, word_embed_proj_dim=24, init_std=0.2, max_position_embeddings=32
    )
    return OPTForCausalLM(config)


def roberta() -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, max_position_embeddings=34))


MODELS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (llama, qwen2, qwen3, opt, roberta)}


def make(family: str, seed: int = 0) -> Any:
    """A model in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    return MODELS[family]().eval()


def tokens(rows: int = 3, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)
