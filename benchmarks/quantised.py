"""What does a quantised base save, and how rough does it make the loss?

    python -m benchmarks.quantised    minutes; needs bitsandbytes and torchao

SmolLM2-135M in float32, and its weights quantised by bitsandbytes and torchao, with LoRA beside
them: the bytes of all weights, how much memory a forward and a step take beyond them, and the error
that rounding inside of the base makes of a projected gradient. For that the loss is evaluated at 17
places along one direction, and a parabola is fitted; what it leaves is the rounding of a loss, and
sqrt(1 / 2) / zo_eps times that is the error of a projected gradient. Writes
benchmarks/results/quantised.csv.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adamezo import AdaMeZO
from adamezo.adapters import adapt, adapters_of
from adamezo.finetune.measure import PeakMemory
from adamezo.integrations import transformers as language_models
from benchmarks.results import Row, conditions, parser, settings, write
from examples.demo import smollm2

SHAPE = (4, 16)  # texts and tokens
REACH = 1e-3


def torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


BASES: dict[str, Callable[[], Any]] = {
    "float32": lambda: None,
    "bitsandbytes, 4 bits": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "bitsandbytes, 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao, 8 bits": torchao,
}


def bytes_of(tensor: Tensor) -> int:
    """Also of a tensor that is made of others, and of the scales beside packed weights."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(bytes_of(getattr(tensor, name)) for name in names)
    state = getattr(tensor, "quant_state", None)
    scales = [state.absmax] if state is not None else []
    if getattr(tensor, "SCB", None) is not None:
        scales.append(tensor.SCB)
    return sum(t.numel() * t.element_size() for t in (tensor.data, *scales))


def along_a_direction(loss: Callable[[], Tensor], trained: list[Tensor]) -> tuple[float, float]:
    """The slope of the loss along one direction, which is its projected gradient, and the standard
    deviation of what a parabola leaves of it."""
    generator = torch.Generator().manual_seed(3)
    z = [torch.randn(p.shape, generator=generator) for p in trained]
    kept = [p.detach().clone() for p in trained]
    places = torch.linspace(-1, 1, 17, dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for place in places.tolist():
            for p, base, along in zip(trained, kept, z, strict=True):
                p.copy_(base + place * REACH * along)
            losses.append(loss().double())
        for p, base in zip(trained, kept, strict=True):
            p.copy_(base)
    found = torch.stack(losses)[:, None]
    powers = torch.stack([places**k for k in range(3)], 1)
    fitted = torch.linalg.lstsq(powers, found).solution
    left = found - powers @ fitted
    rough = (left.square().sum() / (len(places) - 3)).sqrt().item()
    return fitted[1].item() / REACH, rough


def rows(where: dict[str, Any]) -> Iterator[Row]:
    columns = settings(tokens="x".join(map(str, SHAPE)))
    ids = torch.randint(1000, SHAPE, generator=torch.Generator().manual_seed(0))
    memory = PeakMemory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = language_models.load(smollm2())
        language_models.save(model, tokenizer, folder)
        for name, make in BASES.items():
            del model
            gc.collect()
            model = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=make(), dtype=torch.float32
            ).eval()
            weights = sum(map(bytes_of, model.parameters()))
            adapt(model, "lora", seed=0)
            trained = adapters_of(model)
            optimizer = AdaMeZO(trained.items(), lr=1e-3, seed=0)

            @torch.no_grad()
            def loss(model: Any = model) -> Tensor:
                return model(input_ids=ids, labels=ids, use_cache=False).loss

            for _ in range(3):  # lora_B is no longer zero, and what libraries keep is there
                optimizer.step(loss)
            peaks: dict[str, int | None] = {}
            memory.reset()
            loss()
            peaks["forward"] = memory.read()
            memory.reset()
            optimizer.step(loss)
            peaks["step"] = memory.read()
            yield Row("quantised", "weights", "B", name, columns, median=weights, **where)
            if peaks["forward"] is not None and peaks["step"] is not None:
                above = peaks["step"] - peaks["forward"]
                yield Row(
                    "quantised", "step over forward", "B", name, columns, median=above, **where
                )
            slope, rough = along_a_direction(loss, list(trained.values()))
            yield Row("quantised", "p", "1", name, columns, median=slope, **where)
            for zo_eps in (1e-3, 1e-2):
                error = rough * 0.5**0.5 / zo_eps
                label = f"error of p at zo_eps {zo_eps:g}"
                yield Row("quantised", label, "1", name, columns, median=error, **where)


def main() -> None:
    arguments = parser(__doc__, "quantised.csv").parse_args()
    torch.set_num_threads(1)
    made = list(rows(conditions()))
    write(arguments.output, made)
    for r in made:
        print(f"{r.variant}: {r.metric} {r.median:.6g} {r.unit}")


if __name__ == "__main__":
    main()
