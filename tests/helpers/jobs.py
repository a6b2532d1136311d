"""The fine-tuning job on a tiny random model: the model, its tokenizer, data and options."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adamezo import finetune

TEMPLATE = "{text} It was {label}"
WORDS = {"negative": "terrible", "positive": "great"}
VOCABULARY = "<unk> It was terrible great good bad dull fun film plot acting a the very not".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.5,  # the usual 0.02 would give next to equal logits
    )
    return LlamaForCausalLM(config).eval()


def write_reviews(path: Path) -> Path:
    rows = [f"{'not ' * (i % 4)}{word} film {i},{label}" for i in range(20)
            for word, label in (("dull", "negative"), ("fun", "positive"))]  # fmt: skip
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def options(model_folder, data_file, **changed) -> finetune.Options:
    settings = dict(
        model=str(model_folder), data=str(data_file), template=TEMPLATE, label_words=WORDS,
        held_out=10, steps=4, batch_size=4, lr=1e-3, device="cpu",
    )  # fmt: skip
    return finetune.Options(**(settings | changed))
