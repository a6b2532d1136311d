"""``adamezo memory``: what a step needs, from a config, and measured if wanted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from .. import methods
from ..engine.perturb import PERTURBATIONS

_Method: Any = Literal[tuple(methods.__all__)]
_Perturbation: Any = Literal[tuple(PERTURBATIONS)]


def command(
    model: Annotated[
        str, typer.Argument(help="a folder with a config.json, such a file, or a .gguf file")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="texts in a step")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="tokens of a text")] = 256,
    task: Annotated[
        Literal["classification", "lm"],
        typer.Option(
            help="classification scores one position of a text, lm (and instruct, at most) all"
        ),
    ] = "classification",
    method: Annotated[_Method, typer.Option(help="the optimizer")] = "AdaMeZO",
    perturbation: Annotated[_Perturbation, typer.Option(help="its way to perturb")] = "inplace",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="type of the weights")
    ] = "float32",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="also take two steps on this CPU, with random weights"),
    ] = False,
) -> int:
    """Say what memory a training step of a model needs. Weights are neither loaded nor made.

    Counted are weights, what a forward needs at its peak, and what the method keeps. A process has
    some hundreds of MiB besides, for Python and torch.
    """
    from rich.console import Console
    from rich.table import Table

    from ..finetune import needs

    logits = 1 if task == "classification" else tokens
    setup = needs.Setup(batch_size, tokens, logits, method, perturbation, dtype)
    found = needs.needs(model, setup)
    rows = [
        (f"{found.parameters:,} weights, {dtype}", found.weights),
        (f"a forward of {batch_size} x {tokens} tokens, at its peak", found.forward),
    ]
    if found.copies:
        rows.append(("perturbed copies of one module's weights", found.copies))
    if found.buffers:
        rows.append((f"what {method} keeps for each weight, float32", found.buffers))
    table = Table(title=f"A step of {method}", show_footer=True)
    table.add_column("part", footer="a step")
    table.add_column("MiB", footer=_mib(found.step), justify="right")
    for part, size in rows:
        table.add_row(part, _mib(size))
    console = Console()
    console.print(table)
    if perturbation == "regenerated":
        console.print("The forward is of both perturbations together; factors are left out.")
    console.print(
        "Backpropagation with AdamW would keep, besides the weights and all activations of a "
        f"forward, gradients and two float32 moments: {_mib(found.weights + 8 * found.parameters)} "
        "MiB."
    )
    if measure:
        seen = needs.measured(model, setup)
        if seen is None:
            console.print("Not measured: this system does not let a process reset its peak.")
            return 0
        above = found.step - found.weights
        console.print(
            f"Measured on this CPU, above the loaded weights: {_mib(seen.forward)} MiB at the peak "
            f"of a forward (computed: {_mib(found.forward)}), {_mib(seen.step)} at that of a step "
            f"(computed: {_mib(above)})."
        )
    return 0


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
