"""What a step needs in models of published shapes, computed without their weights.

    python -m benchmarks.memory     # a minute, without any weights; memory.csv

The same computation as `adamezo memory` (adamezo/finetune/needs.py). The shapes are those of the
models' configurations; the counts of weights are the published ones, which a test checks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, OPTConfig, Qwen2Config

from adamezo.finetune.needs import Needs, Setup, needs
from benchmarks.results import Row, conditions, parser, settings, write

BATCH, TOKENS = 8, 256


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, words: int) -> Any:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=words,
        num_attention_heads=heads, num_key_value_heads=kv, architectures=["LlamaForCausalLM"],
        tie_word_embeddings=words == 49152,
    )  # fmt: skip


def _opt(hidden: int, layers: int, heads: int) -> Any:
    return OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, vocab_size=50272,
        num_attention_heads=heads, word_embed_proj_dim=hidden, architectures=["OPTForCausalLM"],
    )  # fmt: skip


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv: int, tied: bool) -> Any:
    return Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        vocab_size=151936 if tied else 152064, num_attention_heads=heads, num_key_value_heads=kv,
        tie_word_embeddings=tied, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip


MODELS = {
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3, 49152),
    "Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, True),
    "OPT-1.3B": _opt(2048, 24, 32),
    "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, True),
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256),
    "OPT-13B": _opt(5120, 40, 40),
    "Qwen2.5-32B": _qwen(5120, 27648, 64, 40, 8, False),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8, 128256),
}
SETUPS = {
    "one position": {},
    "all positions": {"logits": TOKENS},
    "one position, out of place": {"perturbation": "out_of_place"},
    "one position, ZOAdam": {"method": "ZOAdam"},
}


def of(name: str, quick: bool = False) -> Iterator[tuple[str, Needs]]:
    """What each kind of step of a model needs, weights in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        MODELS[name].save_pretrained(folder)
        for kind, changed in list(SETUPS.items())[: 1 if quick else None]:
            setup = Setup(batch_size=BATCH, tokens=TOKENS, dtype="bfloat16", **changed)
            yield kind, needs(Path(folder), setup)


def rows(names: list[str], where: dict[str, Any]) -> Iterator[Row]:
    for name in names:
        for kind, found in of(name):
            columns = settings(what=kind, tokens=f"{BATCH}x{TOKENS}", type="bfloat16")
            print(f"{name}, {kind}: {found.step / 1e9:.2f} GB", flush=True)
            for metric, value in (("weights", found.parameters), ("step", found.step)):
                unit = "1" if metric == "weights" else "B"
                yield Row("needs", metric, unit, name, columns, median=value, **where)


def main() -> None:
    arguments = parser(__doc__, "memory.csv").parse_args()
    names = list(MODELS)[:1] if arguments.quick else list(MODELS)
    write(arguments.output, list(rows(names, conditions())))


if __name__ == "__main__":
    main()
