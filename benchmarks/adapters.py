"""What do adapters cost? Trained weights, time and memory of each kind, beside each other.

    python -m benchmarks.adapters    minutes

SmolLM2-135M with each kind of adapters in its published places, and with dense adapters in those of
the tensor trains: the forward pass of a batch over that of the base, a step of AdaMeZO over that of
LoRA, and how far a step's peak of the resident set is above that of a forward pass of the base. All
variants share the weights of one base and are timed in turn. The numbers of trained weights are
counted, for Llama-2-7B too. Then the loss of the main job before the first step, with each init of
the tensor trains. Writes benchmarks/results/adapters.csv.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adamezo import AdaMeZO
from adamezo.adapters import SCHEMES, TensorTrainAdapter, adapt, adapters_of, remove
from adamezo.finetune import Classification, read_examples, split
from adamezo.finetune.measure import PeakMemory
from adamezo.integrations import transformers as language_models
from benchmarks.harness import Variant, interleave
from benchmarks.results import Row, conditions, parser, settings, spread, write
from examples.demo import options, smollm2

SHAPE = (8, 32)  # texts and tokens
BASE, LORA, DENSE = "no adapters", "lora", "dense adapters"
VARIANTS = (BASE, *SCHEMES, DENSE)


class DenseAdapter(nn.Module):
    """What a tensor-train adapter stands for: the same maps as ordinary matrices."""

    def __init__(self, adapter: TensorTrainAdapter) -> None:
        super().__init__()
        self.down, self.up = adapter.down.to_linear(), adapter.up.to_linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


def adapted(base: nn.Module, variant: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A model that shares the weights of the base, and those that it trains beside them."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if variant == BASE:
        return model, {}
    adapt(model, "tensor-train" if variant == DENSE else variant, seed=0)
    if variant != DENSE:
        return model, adapters_of(model)
    for module in list(model.modules()):
        if isinstance(getattr(module, "tensor_train", None), TensorTrainAdapter):
            module.tensor_train = DenseAdapter(module.tensor_train)
    named = model.named_parameters()
    return model, {name: p for name, p in named if ".tensor_train." in name}


def counted(variant: str) -> int:
    """Trained weights of Llama-2-7B, whose own are not made."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig())
    if variant == "prefix":  # begins as activations, which there are none of here
        c, length = base.config, SCHEMES["prefix"].defaults["length"]
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * length
    return sum(p.numel() for p in adapted(base, variant)[1].values())


def rows(repeats: int, threads: int, where: dict[str, Any]) -> Iterator[Row]:
    columns = settings(tokens="x".join(map(str, SHAPE)), threads=threads, horizon=10)
    base = language_models.load(smollm2())[0].requires_grad_(False)
    ids = torch.randint(1000, SHAPE, generator=torch.Generator().manual_seed(0))
    memory = PeakMemory(torch.device("cpu"))
    forwards, steps, peaks, trained = [], [], {}, {}

    def timed(name: str, model: nn.Module, own: dict[str, nn.Parameter]) -> None:
        @torch.no_grad()
        def forward() -> Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        forwards.append(Variant(name, forward, threads))
        run = forward
        if own:
            optimizer = AdaMeZO(own.items(), lr=1e-9, horizon=10, seed=0)

            def run() -> Tensor:
                return optimizer.step(forward)

            for _ in range(11):  # so that the history is full
                optimizer.step(lambda: 1.0)
            steps.append(Variant(name, run, threads))
        run()  # what libraries keep from a first call is there
        memory.reset()
        run()
        peaks[name] = memory.read()
        trained[name] = sum(p.numel() for p in own.values())

    for variant in VARIANTS:
        timed(variant, *adapted(base, variant))
    interleave(forwards, repeats=repeats)
    interleave(steps, repeats=repeats)

    def row(variant: str, metric: str, unit: str, **values: Any) -> Row:
        return Row("adapters", metric, unit, variant, columns, **values, **where)

    first = forwards[0].seconds
    (reference,) = (step.seconds for step in steps if step.name == LORA)
    for v in forwards:
        yield row(v.name, "forward", "s", **spread(v.seconds))
        ratios = [a / b for a, b in zip(v.seconds, first, strict=True)]
        yield row(v.name, "forward over the base's", "1", **spread(ratios))
        if peaks[v.name] is not None and peaks[BASE] is not None:
            above = peaks[v.name] - peaks[BASE]
            yield row(v.name, "peak over the base's forward", "B", median=above)
        yield row(v.name, "trained weights", "1", median=trained[v.name])
        yield row(v.name, "trained weights of Llama-2-7B", "1", median=counted(v.name))
    for v in steps:
        yield row(v.name, "step", "s", **spread(v.seconds))
        ratios = [a / b for a, b in zip(v.seconds, reference, strict=True)]
        yield row(v.name, "step over LoRA's", "1", **spread(ratios))


def before_training(where: dict[str, Any]) -> Iterator[Row]:
    """The loss of 96 held-out reviews of the main job, which each init of tensor trains leaves."""
    job = options()
    model, tokenizer = language_models.load(job.model)
    _, held_out = split(read_examples(job.data), job.held_out)
    scorer = language_models.LabelScorer(model, tokenizer, job.template, job.label_words)
    task = Classification(scorer, held_out[:96])
    for init, seed in [("none", 0), ("zero", 0), *(("published", seed) for seed in range(4))]:
        if init != "none":
            adapt(model, "tensor-train", init=init, seed=seed)
        columns = settings(held_out=96, seed=seed)
        loss = task.evaluate(32).summary()["loss"]
        yield Row("adapters", "loss before training", "1", init, columns, median=loss, **where)
        if init != "none":
            remove(model)


def main() -> None:
    arguments_of = parser(__doc__, "adapters.csv")
    arguments_of.add_argument("--threads", type=int, default=1)
    arguments = arguments_of.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = 3 if arguments.quick else 9
    where = conditions()
    made = [*rows(repeats, arguments.threads, where), *before_training(where)]
    write(arguments.output, made)
    for r in made:
        print(f"{r.variant}: {r.metric} {r.median:.6g} {r.unit}")


if __name__ == "__main__":
    main()
