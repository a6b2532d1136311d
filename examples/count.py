"""A reward in the place of a loss: a small model learns to count, from its score alone.

    python -m examples.count            # three seeds, minutes; writes results/count.json and .png

A Llama of 28,000 weights is first taught a language by backpropagation: a digit d, some letters, a
stop. In half of the texts there are d letters, in the others any number. It then answers the nine
digits by sampling, and a step sees only how near the numbers of letters were. Steps are MeZO's with
eight directions; the rewards of a step's 16 evaluations are z-scored. The share of answers that are
right is measured on other samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adamezo import MeZO
from adamezo.plots import figure, save
from adamezo.rewards import TextReward

RESULTS = Path(__file__).parent / "results"
DIGITS, LETTERS, STOP = "123456789", "abcd", "."
LENGTH = len(DIGITS) + 3
PROMPTS = list(DIGITS) * 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*DIGITS, *LETTERS, STOP, "_", "?"])}
    made = Tokenizer(WordLevel(words, unk_token="?"))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=STOP, pad_token="_", unk_token="?"
    )


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, eos_token_id=13, pad_token_id=14,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def texts(count: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of digit, letters, stop and padding, of which half have as many letters as they say."""

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    digit = draw(9, count)
    letters = torch.where(draw(2, count).bool(), digit, draw(9, count)) + 1
    rows = 9 + draw(4, count, LENGTH)
    place = torch.arange(LENGTH)
    rows[:, 0] = digit
    rows[place > letters[:, None] + 1] = 14
    rows[place == letters[:, None] + 1] = 13
    return rows


def teach(model: LlamaForCausalLM, steps: int, seed: int) -> None:
    """The language, by backpropagation."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = texts(128, generator)
        loss = model(input_ids=rows, labels=rows.masked_fill(rows == 14, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(True)


def letters_in(text: str) -> int:
    return sum(c in LETTERS for c in text)


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    """1 for as many letters as the digit says, less by a ninth for each that is wrong."""
    pairs = zip(prompts, completions, strict=True)
    return [1 - abs(letters_in(text) - int(prompt)) / 9 for prompt, text in pairs]


def right(prompts: list[str], completions: list[str]) -> list[float]:
    pairs = zip(prompts, completions, strict=True)
    return [float(letters_in(text) == int(prompt)) for prompt, text in pairs]


def run(seed: int, steps: int, lr: float, zo_eps: float, queries: int) -> dict[str, Any]:
    began = time.perf_counter()
    model, tokenizer = make_model(seed), make_tokenizer()
    teach(model, 300, seed)
    taught = time.perf_counter()
    options = dict(max_new_tokens=LENGTH, do_sample=True)
    score = TextReward(model, tokenizer, reward, shaping="z-score", **options)
    test = TextReward(model, tokenizer, right, **options)
    optimizer = MeZO.for_model(
        model, lr=lr, zo_eps=zo_eps, queries=queries, seed=seed, maximize=True
    )

    def measure() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(10**6)
            return test.evaluate(PROMPTS * 2)

    curve, held_out = [], [(0, measure())]
    torch.manual_seed(seed)
    for step in range(1, steps + 1):
        curve.append(score.step(optimizer, PROMPTS))
        if step % 20 == 0:
            held_out.append((step, measure()))
            print(f"seed {seed}, step {step}: right {held_out[-1][1]:.3f}", flush=True)
    return {
        "seed": seed,
        "rewards": curve,
        "right": held_out,
        "seconds": {"taught": taught - began, "steps": time.perf_counter() - taught},
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    made, (left, right_hand) = figure(2, width=4.5, height=3.4)
    for one in runs:
        left.plot(one["rewards"], alpha=0.8, label=f"seed {one['seed']}")
        right_hand.plot(*zip(*one["right"], strict=True), "o-")
    left.set(xlabel="step (16 evaluations)", ylabel="mean reward of a step")
    right_hand.set(xlabel="step (16 evaluations)", ylabel="answers that are right", ylim=(0, 1))
    left.legend()
    save(made, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--zo-eps", type=float, default=1e-2)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "count.json")
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    options = parser.parse_args()
    if options.plot:
        found = json.loads(options.out.read_text(encoding="utf-8"))
        plot(found["runs"], options.out.with_suffix(".png"))
        return
    settings = (options.steps, options.lr, options.zo_eps, options.queries)
    runs = [run(seed, *settings) for seed in options.seeds]
    ends = [[one["right"][i][1] for one in runs] for i in (0, -1)]
    before, after = map(statistics.mean, ends)
    names = ("steps", "lr", "zo_eps", "queries")
    result = {
        "command": "python -m examples.count",
        "options": dict(zip(names, settings, strict=True)),
        "right": {"before": before, "after": after},
        "runs": runs,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(runs, options.out.with_suffix(".png"))
    print(f"right before {before:.3f}, after {after:.3f}; {options.out}")


if __name__ == "__main__":
    main()
