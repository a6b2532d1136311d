"""What benchmarks.step measures: jobs (a model, a batch, a device), methods, plans of both."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from adamezo import FZOO, GRZO, AdaMeZO, PerturbedBatch
from adamezo_kernels.backends import BACKENDS
from benchmarks.library_calls import AsReleased, Fair, LibraryOptimizer

SEED = 2026
# So small that hundreds of steps leave the weights what they are; time does not depend on it.
LR = 1e-12

Closure = Callable[[], Tensor]
Step = Callable[[Closure], object]


def main_model(dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M-Instruct."""
    from adamezo.integrations.transformers import load
    from examples.demo import smollm2

    return load(smollm2(), dtype=dtype, device=torch.get_default_device())[0]


def opt(hidden: int, layers: int, heads: int, vocabulary: int, dtype: torch.dtype) -> nn.Module:
    """Random weights in the shapes of an OPT model."""
    from transformers import AutoModelForCausalLM, OPTConfig

    sizes = dict(hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden)
    counts = dict(num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocabulary)
    config = OPTConfig(**sizes, **counts, max_position_embeddings=2048)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "SmolLM2-135M": main_model,
    "OPT-1.3B": functools.partial(opt, 2048, 24, 32, 50272),
    # For tests, and to run all of a benchmark where there is no GPU.
    "OPT-tiny": functools.partial(opt, 32, 2, 4, 128),
}


@dataclass(frozen=True)
class Job:
    """All of a step but its method. `benchmark` is the column of its rows."""

    benchmark: str
    model: str
    type: str
    length: int
    batch: int = 16
    device: str = "cpu"

    @property
    def tokens(self) -> str:
        return f"{self.batch}x{self.length}"

    def load(self) -> nn.Module:
        torch.manual_seed(SEED)
        with torch.device(self.device):
            return MODELS[self.model](getattr(torch, self.type)).eval()

    def losses(self, model: Any) -> Callable[[PerturbedBatch], Tensor]:
        """The main job's forward: cross entropy of the label word after the prompt, on one batch,
        for each perturbation of it. The vocabulary's logits at the last position alone."""
        generator = torch.Generator().manual_seed(SEED)
        size = model.config.vocab_size
        tokens = torch.randint(size // 40, size, (self.batch, self.length), generator=generator)
        labels = torch.randint(0, 2, (self.batch,), generator=generator)
        words = torch.tensor([4255, 1799]) % size
        tokens, labels, words = (t.to(self.device) for t in (tokens, labels, words))

        def losses(batch: PerturbedBatch) -> Tensor:
            ids, answers = batch.repeat(tokens), batch.repeat(labels)
            scores = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1, words]
            rows = nn.functional.cross_entropy(scores.float(), answers, reduction="none")
            return batch.mean(rows)

        return losses


FORWARDS = {"bare": 2, "MeZO": 2, "AdaMeZO": 2, "AdamW": 1, "FZOO": 9, "nine bare": 9}

LOW_RANK = {"distribution": "lowrank"}
REGENERATED = {**LOW_RANK, "perturbation": "regenerated"}

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, fast directions": {"distribution": "fast"},
    "ours, Triton": {},
    "ours, out of place": {"perturbation": "out_of_place"},
    "ours, low rank": LOW_RANK,
    "ours, regenerated": REGENERATED,
    "ours, regenerated in one batch": REGENERATED,
    "ours, regenerated, exact directions, in one batch": {"perturbation": "regenerated"},
    "ours, regenerated, shared normals, in one batch": {
        "perturbation": "regenerated",
        "distribution": "flipout",  # of as many as a step has
    },
}


@dataclass(frozen=True)
class Method:
    """A variant of a row and the optimizer behind it, with its history full."""

    variant: str
    method: str
    horizon: int = 0

    @property
    def betas(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.method == "MeZO" else (0.7, 0.9)

    @property
    def one_batch(self) -> bool:
        """Whether a step evaluates all perturbations in one forward."""
        return self.variant.endswith("in one batch")

    @property
    def forwards(self) -> int:
        """How often a step calls its closure."""
        return 1 if self.one_batch else FORWARDS[self.method]

    def __str__(self) -> str:
        if self.method == "bare":
            return "two bare forwards"
        if self.method == "nine bare":
            return "nine bare forwards"
        return f"{self.method}{f' H={self.horizon}' if self.horizon > 1 else ''}, {self.variant}"

    def backend(self, device: str) -> str:
        """The name of the backend that one of OURS runs on."""
        if self.variant == "ours, Triton":
            return "triton"
        return {"cpu": "native", "cuda": "cuda"}[device]

    def missing(self, device: str, batch: int = 16) -> str:
        """Why it cannot run on this device with such a batch; empty where it can."""
        if self.variant not in OURS:
            return ""
        if self.method == "GRZO" and batch < 2:
            return "it compares the examples of a batch, which has one"
        backend = BACKENDS[self.backend(device)]
        kind = OURS[self.variant].get("distribution", "exact")
        available, reason = backend.availability()
        if available and not backend.supports(torch.device(device)):
            reason = f"it does not run on {device}"
        elif available:
            reason = "" if kind in backend.DISTRIBUTIONS else f"it has no {kind!r} directions"
        return f"backend {self.backend(device)!r}: {reason}" if reason else ""

    def make(self, model: nn.Module, device: str = "cpu", batch: int = 16) -> Step:
        """The `step` of a new optimizer; its time is that of any step after the first `horizon`."""
        if self.method in ("bare", "nine bare"):
            return functools.partial(bare_forwards, FORWARDS[self.method])
        if self.method == "AdamW":
            # Its default eps is 0 in float16, and some gradients are 0.
            adamw = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6)
            return functools.partial(backpropagation, adamw)
        # Two alternating values, as losses of +-1e-3 about a level would give.
        grads = [0.5 * (-1) ** age for age in range(self.horizon)]
        if self.variant not in OURS:
            operations = (Fair if self.variant == "torch" else AsReleased)(model.parameters())
            library = LibraryOptimizer(operations, lr=LR, betas=self.betas, horizon=self.horizon)
            library.history = [(SEED + age, grad) for age, grad in enumerate(grads)]
            return library.step
        options: dict[str, Any] = dict(OURS[self.variant], lr=LR, seed=SEED)
        if "perturbation" in options:
            options["model"] = model
        each = {"FZOO": FORWARDS["FZOO"] - 1, "GRZO": batch}.get(self.method)
        if options.get("distribution") == "flipout":
            options["distribution"] = f"flipout:{each}"
        backend = {"ADAMEZO_BACKEND": self.backend(device)}  # refused, where it is not there
        optimizer: AdaMeZO | FZOO | GRZO
        with mock.patch.dict(os.environ, backend):
            if self.method == "FZOO":
                optimizer = FZOO(model.parameters(), queries=each, **options)
            elif self.method == "GRZO":
                optimizer = GRZO(model.parameters(), examples=each, **options)
            else:
                history = {"betas": self.betas, "horizon": self.horizon}
                optimizer = AdaMeZO(model.parameters(), **history, **options)
                full_history(optimizer, grads)

        def step(closure: Closure) -> object:
            with mock.patch.dict(os.environ, backend):
                return optimizer.step(closure)

        return step


def full_history(optimizer: AdaMeZO, grads: Sequence[float]) -> None:
    """Gives an optimizer these projected gradients, of the directions 0, 1, ..."""
    state, horizon = optimizer.state_dict(), len(grads)
    for group in state["param_groups"]:
        group.update(
            directions=list(range(horizon))[::-1],
            projected_grads=list(grads),
            steps=horizon,
            next_direction=horizon,
        )
    optimizer.load_state_dict(state)


@torch.no_grad()
def bare_forwards(count: int, closure: Closure) -> object:
    return sum(closure() for _ in range(count))


def backpropagation(optimizer: torch.optim.Optimizer, closure: Closure) -> object:
    """A forward, then a backward pass and the update: the split counts both of these as one."""
    loss = closure()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


BARE = Method("forward", "bare")
NINE = Method("forward", "nine bare")
MEZO = Method("ours", "MeZO", 1)
ADAMEZO, ADAMEZO_20 = (Method("ours", "AdaMeZO", horizon) for horizon in (10, 20))
OUT_OF_PLACE = Method("ours, out of place", "AdaMeZO", 10)
RELEASED = {m: Method("as released", m.method, m.horizon) for m in (MEZO, ADAMEZO, ADAMEZO_20)}
TORCH = {m: Method("torch", m.method, m.horizon) for m in (MEZO, ADAMEZO)}
ADAMW = Method("backpropagation", "AdamW", 1)
ONLY_GPU = [
    Method(variant, "AdaMeZO", horizon)
    for variant in ("ours, fast directions", "ours, Triton")
    for horizon in (10, 20)
]
BY_HORIZON = {h: Method("ours", "AdaMeZO", h) for h in (1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 64)}


@dataclass(frozen=True)
class Plan:
    """What is measured in each job: the time of some methods, and the peak memory of some. Memory
    is measured in the jobs of the first type, as it does not depend on which 16 bits a weight is
    in."""

    jobs: Sequence[Job]
    methods: Sequence[Method]
    peaks: Sequence[Method]


SHORT, LONG = (Job("step", "SmolLM2-135M", "float32", length) for length in (32, 128))
GPU_TYPES, GPU_LENGTHS = ("bfloat16", "float16"), (64, 256)
GPU_JOBS = [
    Job("paper", "OPT-1.3B", kind, length, device="cuda")
    for kind in GPU_TYPES
    for length in GPU_LENGTHS
]
METHODS = [
    *(BARE, MEZO, ADAMEZO, ADAMEZO_20, *ONLY_GPU, OUT_OF_PLACE),
    *(RELEASED[MEZO], RELEASED[ADAMEZO], RELEASED[ADAMEZO_20]),
    *(TORCH[MEZO], TORCH[ADAMEZO], ADAMW),
]
PEAKS = [MEZO, ADAMEZO, OUT_OF_PLACE, RELEASED[MEZO], RELEASED[ADAMEZO], ADAMW]
H_JOBS = [replace(job, benchmark="horizon") for job in (SHORT, GPU_JOBS[1])]
H_PEAKS = [BY_HORIZON[h] for h in (1, 10, 64)]
BATCHES = [
    replace(SHORT, benchmark="regenerated", batch=batch, length=length)
    for batch, length in ((1, 32), (4, 32), (16, 32), (16, 128))
]
IN_BATCH = "ours, regenerated in one batch"
EXACT_IN_BATCH = "ours, regenerated, exact directions, in one batch"
SHARED_IN_BATCH = "ours, regenerated, shared normals, in one batch"
BY_PERTURBATION = [
    BARE,
    *(Method(variant, "AdaMeZO", 10) for variant in ("ours", "ours, out of place")),
    *(Method(variant, "AdaMeZO", 10) for variant in ("ours, low rank", "ours, regenerated")),
    *(Method(variant, "AdaMeZO", 10) for variant in (IN_BATCH, EXACT_IN_BATCH)),
    *(NINE, Method("ours, regenerated", "FZOO", 1), Method(IN_BATCH, "FZOO", 1)),
    *(Method(SHARED_IN_BATCH, method, 1) for method in ("FZOO", "GRZO")),
]
PLANS = {
    "step_cpu": Plan([SHORT, LONG], [m for m in METHODS if m != RELEASED[ADAMEZO_20]], PEAKS),
    "paper_gpu": Plan(GPU_JOBS, METHODS, [*PEAKS, ADAMEZO_20, ONLY_GPU[2]]),
    "regenerated_cpu": Plan(BATCHES, BY_PERTURBATION, BY_PERTURBATION[2:7]),
    "horizon_cpu": Plan(H_JOBS[:1], list(BY_HORIZON.values()), H_PEAKS),
    "horizon_gpu": Plan(H_JOBS[1:], list(BY_HORIZON.values()), H_PEAKS),
}
"""By the file that `benchmarks.step` writes."""
