"""Whatever the shapes, types, strides, options and accidents: the compiled kernels take the steps
of the reference, to the bit, a log replays them, and a state goes on with them.

This tries more, and new ones each time:

    ADAMEZO_EXAMPLES=5000 python -m pytest tests/optimizers/test_property.py
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from adamezo import AdaMeZO
from adamezo.runlog import StepLog, optimizer_for, read, replay
from adamezo_kernels.backends import native
from helpers.backends import needs_native
from stress import history, same_bits

EXAMPLES = int(os.environ.get("ADAMEZO_EXAMPLES", "0"))
PROFILE = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Failure(Exception):
    pass


@st.composite
def tensors(draw) -> dict[str, Any]:
    """How to make a weight: its shape, its type, where it begins, how far rows are apart, and
    whether the order of its dimensions in memory is another."""
    dimensions = draw(st.integers(0, 3))
    sizes = (
        st.integers(0, 9) if dimensions > 1 else st.sampled_from([0, 1, 3, 4, 17, 64, 130, 1025])
    )
    return {
        "shape": tuple(draw(st.lists(sizes, min_size=dimensions, max_size=dimensions))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "offset": draw(st.integers(0, 17)),
        "gap": draw(st.integers(0, 5)),
        "turned": draw(st.booleans()),
        "frozen": draw(st.integers(0, 9)) == 0,
        "scale": draw(st.sampled_from([1.0, 1e-30, 1e-6, 300.0])),
    }


def make(spec: dict[str, Any], seed: int) -> nn.Parameter:
    shape, offset, gap = spec["shape"], spec["offset"], spec["gap"]
    wide = (*shape[:-1], shape[-1] + gap) if shape else ()
    numel = math.prod(wide)
    generator = torch.Generator().manual_seed(seed)
    memory = (torch.randn(offset + numel, generator=generator) * spec["scale"]).to(spec["dtype"])
    whole = memory[offset:].view(wide)
    view = whole[..., : shape[-1]] if shape else whole
    if spec["turned"]:
        view = view.permute(tuple(reversed(range(view.dim()))))
    return nn.Parameter(view, requires_grad=not spec["frozen"])


numbers = st.floats(allow_nan=False, allow_infinity=False)
betas = st.sampled_from([0.0, 0.5, 0.7, 0.9, 0.999]) | st.floats(0, 1, exclude_max=True)


@st.composite
def groups(draw) -> list[dict[str, Any]]:
    return [
        {
            "tensors": draw(st.lists(tensors(), min_size=1, max_size=3)),
            "lr": draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.1]) | st.floats(0, 1)),
            "betas": (draw(betas), draw(betas)),
            "eps": draw(st.sampled_from([1e-8, 1e-5, 1.0])),
            "horizon": draw(st.integers(1, 12)),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "normalization": draw(st.sampled_from(["paper", "bias_corrected"])),
            "warmup_lr": draw(st.sampled_from([None, None, 1e-3])),
            "rounding": draw(st.sampled_from(["nearest", "stochastic"])),
            "maximize": draw(st.booleans()),
        }
        for _ in range(draw(st.integers(1, 3)))
    ]


losses = st.floats(-5, 5) | st.sampled_from([0.0, 1e-30, 1e15, math.nan, math.inf])
steps = st.lists(
    st.tuples(losses, losses)
    | st.tuples(losses, st.just("raise"))
    | st.tuples(st.just("raise"), losses),
    min_size=1,
    max_size=8,
)
shared = st.fixed_dictionaries(
    {
        "zo_eps": st.sampled_from([1e-3, 1e-2, 0.3]),
        "distribution": st.sampled_from(["exact", "rademacher"]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


def build(specs, options, **more) -> tuple[AdaMeZO, list[nn.Parameter]]:
    made, parameters = [], []
    for i, spec in enumerate(specs):
        own = [(f"{i}.{j}", make(tensor, 100 * i + j)) for j, tensor in enumerate(spec["tensors"])]
        parameters += [p for _, p in own]
        made.append({**{k: v for k, v in spec.items() if k != "tensors"}, "params": own})
    return AdaMeZO(made, max_skipped=99, **options, **more), parameters


def take(optimizer: AdaMeZO, pairs) -> None:
    for pair in pairs:
        values = iter(pair)

        def closure(values=values):
            value = next(values)
            if value == "raise":
                raise Failure
            return value

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step(closure)
        except Failure:
            assert "raise" in pair


def bits(parameters) -> list[torch.Tensor]:
    """With one number for all NaN: which one it is is not promised."""
    return [torch.nan_to_num(p.detach(), nan=12345.0) for p in parameters]


@needs_native
@PROFILE
@given(groups(), shared, steps, st.data())
def test_a_run(specs, options, pairs, data):
    isa = data.draw(st.sampled_from(native.instruction_sets()), "instruction set")
    stop = data.draw(st.integers(0, len(pairs)), "where it is stopped")
    expected, reference = build(specs, options, fused=False)
    if not any(p.requires_grad for p in reference):
        return
    take(expected, pairs)
    with native.use_isa(isa), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        optimizer, parameters = build(specs, options)
        start = {
            f"{i}.{j}": make(tensor, 100 * i + j).detach()
            for i, spec in enumerate(specs)
            for j, tensor in enumerate(spec["tensors"])
        }
        with StepLog.create(path, optimizer):
            take(optimizer, pairs[:stop])
            # A state that was saved here and loaded into another optimizer goes on, too.
            state = optimizer.state_dict()
            take(optimizer, pairs[stop:])
        assert same_bits(bits(parameters), bits(reference))
        assert history(optimizer) == history(expected)
        log = read(path)
        replay(log, optimizer_for(log.header, start))
        moved = [p for p in parameters if p.requires_grad]
        again = [t for t, p in zip(start.values(), parameters, strict=True) if p.requires_grad]
        assert same_bits(bits(again), bits(moved))
        first, second_weights = build(specs, options)
        take(first, pairs[:stop])
        second, _ = build(specs, options)
        second.load_state_dict(state)
        for group, other in zip(second.param_groups, first.param_groups, strict=True):
            group["params"] = other["params"]
        take(second, pairs[stop:])
        assert same_bits(bits(second_weights), bits(reference))
