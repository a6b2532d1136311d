"""``adamezo doctor``: what runs here, what would be faster, and a test of the kernels' bits."""

from __future__ import annotations

import importlib.util
import os
import random
import time
from collections import Counter
from contextlib import ExitStack
from importlib import metadata
from typing import Annotated, Any

import torch
import typer

from adamezo_kernels import ROUNDINGS, Call, PhiloxState, Plan, Terms, run
from adamezo_kernels.__main__ import report
from adamezo_kernels.backends import BACKENDS, Backend, native, reference

EXTRAS = {
    "transformers": ("cli", "finetune, memory"),
    "pandas": ("cli", "data from files"),
    "pyarrow": ("cli", ".parquet files"),
    "datasets": ("cli", "folders that datasets has saved"),
    "matplotlib": ("cli", "curves.png"),
    "gguf": ("cli", ".gguf models"),
    "safetensors": ("cli", "replay to and from .safetensors"),
    "peft": ("lora", "LoRA adapters"),
    "triton": ("triton", "kernels on a GPU without nvcc"),
}
"""Packages that commands use, with the extra that brings each and what it is for."""

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def command(
    seconds: Annotated[
        float, typer.Option(min=0, help="how long to compare bits; 0 leaves that out")
    ] = 20.0,
) -> int:
    """Say what runs here, what would be faster, and compare the kernels' bits with the reference's.

    Ends with exit code 1 where bits differ.
    """
    print(report())
    print()
    for name, (extra, use) in EXTRAS.items():
        try:
            state = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = importlib.util.find_spec(name) is not None
            state = "found" if found else f"missing: pip install 'adamezo[{extra}]'"
        print(f"{name:<14} {state:<40} {use}")
    print("\nwhat would be faster:")
    for line in advice() or ["nothing that is known here"]:
        print(f"- {line}")
    if not seconds:
        return 0
    counts, wrong = self_test(seconds)
    print(f"\nbits compared with the reference's for {seconds:g} s:")
    for name, count in counts.items():
        print(f"- {name}: {count:,} calls")
    if not counts:
        print("- nothing to compare: the reference does all the work here")
    for line in wrong[:5]:
        print(f"- DIFFERENT BITS: {line}")
    if wrong:
        print(
            f"{len(wrong)} calls differ: do not train with this build. Build it again, and please "
            "report this output"
        )
    return int(bool(wrong))


def advice() -> list[str]:
    """What this machine could do better, as sentences."""
    lines = []
    if not native.availability()[0]:
        lines.append(f"compiled CPU kernels: {native.availability()[1]}")
    elif native.instruction_set() != native.instruction_sets()[0]:
        lines.append(
            f"{native.instruction_sets()[0]} instructions: ADAMEZO_ISA holds the kernels to "
            f"{native.instruction_set()}"
        )
    if os.environ.get("ADAMEZO_BACKEND") == "reference":
        lines.append("another backend: ADAMEZO_BACKEND holds everything to the reference")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and torch.get_num_threads() < cores:
        lines.append(
            f"{cores} threads, as many as there are cores: torch uses {torch.get_num_threads()} "
            "(OMP_NUM_THREADS, torch.set_num_threads)"
        )
    if not torch.cuda.is_available():
        lines.append(f"a CUDA device: torch {torch.__version__} finds none")
    elif not BACKENDS["cuda"].availability()[0]:
        lines.append(f"CUDA kernels: {BACKENDS['cuda'].availability()[1]}")
    return lines


def self_test(seconds: float, seed: int | None = None) -> tuple[Counter[str], list[str]]:
    """Compares calls of random kinds, types and sizes with the reference, bit for bit.

    Args:
        seconds: how long.
        seed: of the calls; None takes the clock's.

    Returns:
        How many calls of each backend were compared, and those that differ, in words.
    """
    chosen = random.Random(time.time_ns() if seed is None else seed)
    able: list[tuple[str, Backend, str | None]] = []
    for name, backend in BACKENDS.items():
        if name != "reference" and backend.availability()[0]:
            sets = native.instruction_sets() if backend is BACKENDS["native"] else (None,)
            able += [(f"{name} {isa or ''}".strip(), backend, isa) for isa in sets]
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.perf_counter() + seconds
    while able and time.perf_counter() < end:
        for name, backend, isa in able:
            kinds = [d for d in backend.DISTRIBUTIONS if d in reference.DISTRIBUTIONS]
            case = _case(chosen, kinds)
            device = torch.device("cpu" if backend is BACKENDS["native"] else "cuda")
            with ExitStack() as held:
                if isa is not None:
                    held.enter_context(native.use_isa(isa))
                got = _result(case, backend, device)
            expected = _result(case, BACKENDS["reference"], torch.device("cpu"))
            counts[name] += 1
            if any(not _same(a, b) for a, b in zip(got, expected, strict=True)):
                wrong.append(f"{name}: {case}")
    return counts, wrong


def _case(chosen: random.Random, kinds: list[str]) -> dict[str, Any]:
    return {
        "sizes": [chosen.choice([1, 3, 127, 128, 129, 1000]) for _ in range(3)],
        "dtype": chosen.choice(list(_BITS)),
        "distribution": chosen.choice(kinds),
        "rounding": chosen.choice(ROUNDINGS),
        "operation": chosen.choice(["perturb", "update"]),
        "directions": chosen.randint(1, 10),
        "moments": chosen.random() < 0.5,
        "seed": chosen.getrandbits(63),
    }


def _result(case: dict[str, Any], backend: Backend, device: torch.device) -> list[torch.Tensor]:
    """The weights after the call of a case."""
    generator = torch.Generator().manual_seed(case["seed"])
    tensors = [
        (0.02 * torch.randn(size, generator=generator)).to(case["dtype"]).to(device)
        for size in case["sizes"]
    ]
    count = case["directions"]
    states = [PhiloxState(case["seed"], count - i) for i in range(count)]
    first = torch.randn(count, generator=generator).tolist()
    second = torch.rand(count, generator=generator).tolist() if case["moments"] else None
    if case["operation"] == "perturb":
        terms, scale = Terms.of(states[:1]), 1e-3
    else:
        terms, scale = Terms.of(states, first, second, minus_lr=-1e-3, decay=0.999), 1e-3
    of = case["distribution"], case["rounding"], scale
    run(Call(case["operation"], Plan(tensors), terms, *of, eps=1e-8), backend)
    return [tensor.cpu() for tensor in tensors]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(_BITS[a.dtype]), b.view(_BITS[b.dtype]))
