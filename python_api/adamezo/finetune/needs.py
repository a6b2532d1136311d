"""The memory of a step, computed from a model's config alone: no weights are made or loaded."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import methods
from ..integrations import transformers as language_models
from ..integrations.sequences import log_probs_of
from .measure import PeakMemory


@dataclass(frozen=True)
class Needs:
    """Bytes of a step, and of the parts that it is the sum of."""

    parameters: int
    """How many weights the model has; a count, not bytes."""
    weights: int
    forward: int
    """What a forward of the batch needs at its peak, beyond the weights."""
    copies: int
    """Perturbed copies of weights, with ``perturbation="out_of_place"``."""
    buffers: int
    """What the method keeps for each weight."""

    @property
    def step(self) -> int:
        return self.weights + self.forward + self.copies + self.buffers


@dataclass(frozen=True)
class Setup:
    """The step that is asked about.

    Attributes:
        batch_size, tokens: the shape of a batch.
        logits: at how many positions of a text the vocabulary is scored: 1 where one of a few words
            follows, ``tokens`` for language modelling.
        method: the name of an optimizer.
        perturbation: its way to perturb.
        dtype: of the weights, torch's name.
    """

    batch_size: int = 16
    tokens: int = 256
    logits: int = 1
    method: str = "AdaMeZO"
    perturbation: str = "inplace"
    dtype: str = "float32"


class Live(TorchDispatchMode):
    """Inside, counts the bytes of tensors that are made and still there: ``peak`` is their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._users: Counter[int] = Counter()
        self._known: set[int] = set()

    def know(self, tensors: Any) -> None:
        """Leaves out tensors that were there before."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._made(tensor)
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if not self._users[key]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[key] += 1
        weakref.finalize(tensor, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self.now -= size


def needs(path: str | Path, setup: Setup) -> Needs:
    """What a step of a model needs.

    Args:
        path: a folder with a config.json, such a file, or a .gguf file; weights are not read.
        setup: the step.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or its forward cannot be followed
            without weights.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = language_models.from_config(path, dtype=getattr(torch, setup.dtype))
        parameters = list({id(p): p for p in model.parameters()}.values())
        live = Live()
        live.know([*parameters, *model.buffers()])
        # With "regenerated" all perturbations of a step are one batch.
        rows = setup.batch_size * (2 if setup.perturbation == "regenerated" else 1)
        try:
            with torch.no_grad(), live:
                _forward(model, rows, setup)
        except Exception as error:
            raise ValueError(
                f"{path}: the forward of a {type(model).__name__} needs the values of weights or "
                f"tokens ({type(error).__name__}), so its memory cannot be computed; measure it "
                "with --measure"
            ) from error
    own = [sum(p.nbytes for p in m._parameters.values() if p is not None) for m in model.modules()]
    count = sum(p.numel() for p in parameters)
    kept = len(getattr(getattr(methods, setup.method), "buffers", {}))
    return Needs(
        parameters=count,
        weights=sum(p.nbytes for p in parameters),
        forward=live.peak,
        copies=max(own) if setup.perturbation == "out_of_place" else 0,
        buffers=4 * kept * count,
    )


def _forward(model: Any, rows: int, setup: Setup) -> Tensor:
    """The forward of a batch without padding, and what a loss makes of its logits."""
    inputs = language_models.Inputs(model)
    tokens = torch.ones(rows, setup.tokens, dtype=torch.long)
    logits = inputs.of_tokens(tokens, None, setup.logits)
    if setup.logits == 1:
        return logits[:, -1, :2].float()
    return log_probs_of(logits, tokens[:, 1:])


@dataclass(frozen=True)
class Measured:
    """Bytes above the process before it: at the peak of a forward, and of a step."""

    forward: int
    step: int


def measured(path: str | Path, setup: Setup) -> Measured | None:
    """The same on this machine's CPU, in a process of its own, with weights of random numbers; None
    where a process cannot reset its peak."""
    # Of memory in use: glibc would keep up to hundreds of MiB of what was freed, or not.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    code = "import sys; from adamezo.finetune import needs; needs.measure_and_print(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), json.dumps(asdict(setup))],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the step that was to be measured failed: {done.stderr[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else Measured(**found)


def measure_and_print(path: str, setup: str) -> None:
    """What the process of :func:`measured` does: prints the measurement as JSON."""
    found = _measure(path, Setup(**json.loads(setup)))
    print(json.dumps(None if found is None else asdict(found)))


def _measure(path: str, setup: Setup) -> Measured | None:
    torch.manual_seed(0)
    model = language_models.from_config(path, dtype=getattr(torch, setup.dtype)).eval()
    optimizer = getattr(methods, setup.method).for_model(
        model, lr=0.0, seed=0, perturbation=setup.perturbation
    )

    def closure() -> float:
        _forward(model, setup.batch_size, setup)
        return 1.0

    with torch.no_grad():
        closure()  # makes what stays: thread pools, packed buffers
    gc.collect()
    peak = PeakMemory(torch.device("cpu"))
    before = _resident()
    peak.reset()
    with torch.no_grad():
        closure()
    forward = peak.read()
    peak.reset()
    for _ in range(2):
        optimizer.step(closure)
    step = peak.read()
    if forward is None or step is None or before is None:
        return None
    return Measured(forward - before, step - before)


def _resident() -> int | None:
    """Bytes of this process's resident set; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found.group(1)) * 1024 if found else None
