"""``adamezo replay``: the weights of a logged run, without forward passes."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from .. import runlog
from ..display import Display


def command(
    base: Annotated[
        str,
        typer.Argument(
            help="the weights at the beginning of the log: a .safetensors file, a state_dict by "
            "torch.save, a folder of a transformers model, or a .gguf file"
        ),
    ],
    log: Annotated[
        str,
        typer.Argument(
            help="file that `adamezo finetune` (run.log in its --output) or "
            "adamezo.runlog.StepLog has written"
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="file for the weights (.safetensors, .pt, .pth, .bin); for a model also a folder"
        ),
    ],
    until: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="the step to stop after", show_default="the last one"),
    ] = None,
) -> int:
    """Recompute the weights of a logged run, bit for bit and without a forward pass."""
    with Display() as display:
        progress = partial(display.track, description="replaying")
        steps = runlog.replay_file(base, log, out, until=until, progress=progress)
    print(f"{out}: the weights after {steps} steps")
    return 0
