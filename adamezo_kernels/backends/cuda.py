"""The CUDA kernels of the compiled module, queued on the caller's current stream.

No call waits for the device. What a kernel reads besides the weights gets there in two tensors:

- the table of segments, copied once for each plan and stream;
- the directions and their coefficients, copied for each call. One small copy from pinned memory
  serves any number of directions, where kernel parameters would end at 4 KB, and leaves these
  numbers where a captured step could read fresh ones.

Both are allocated under the current stream and used on no other, so torch's caching allocators keep
them until that stream is done with them: the pinned side by the event that a non-blocking copy
records, the device side by the order of the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import ELEMENT_TYPES, Launch, Plan
from ..stream import ROUNDINGS, PhiloxState
from . import native
from .native import compiled

NAME = "cuda"

DISTRIBUTIONS = ("exact", "fast", "rademacher")
"""Their place here is their number in csrc/adamezo/job.h."""

OPERATIONS = ("sample", "perturb", "update", "moment")
"""Their place here is their number in csrc/adamezo/job.h."""

# A launch does elements whose indices agree above these bits: 2**32 Philox calls of 4 elements.
_LOG_ELEMENTS_PER_HIGH = 34


@functools.cache
def availability() -> tuple[bool, str]:
    """Whether the kernels can run in this process, and one line on why (not)."""
    able, reason = native.availability()
    if not able:
        return False, reason
    built = native.build_report()["cuda"]
    if built.startswith("off"):
        return False, (
            f"the compiled module was built without CUDA ({built}). Install a CUDA toolkit, then "
            "`ADAMEZO_CUDA=ON pip install --force-reinstall --no-deps .`"
        )
    return _usable(built, torch.version.cuda, native.cuda_report())


def _usable(built: str, torch_cuda: str | None, found: dict[str, Any]) -> tuple[bool, str]:
    driver, runtime = found["driver_version"], found["runtime_version"]
    if not driver:
        return False, f"built by {built}, but this machine has no NVIDIA driver: install one"
    if driver // 1000 < runtime // 1000:
        return False, (
            f"built by {built}, but the NVIDIA driver here is for CUDA up to {_version(driver)}: "
            f"install a driver for CUDA {_version(runtime)}, or build with an older toolkit"
        )
    if not found["devices"]:
        return False, (
            f"built by {built}, but CUDA finds no device ({found['error']}): check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES"
        )
    if torch_cuda is None:
        return False, (
            f"built by {built}, but torch {torch.__version__} is without CUDA: install a CUDA "
            "build of torch"
        )
    return True, f"built by {built}; {found['devices']} device(s)"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def supports(device: torch.device) -> bool:
    return device.type == "cuda"


class Place:
    """A device, with the current stream of this thread, as where a launch runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # torch's own guard, as it knows which device to go back to: the runtime that is linked into
        # the module does not.
        self.guard = torch.cuda.device(device)
        self.stream = torch.cuda.current_stream(device).cuda_stream

    def host_words(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, pin_memory=True)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy on the device, without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def run(self, job: Any) -> None:
        compiled.cuda_launch(job, self.device.index, self.stream)


def _call(
    launch: Launch,
    operation: str,
    states: Sequence[PhiloxState],
    distribution: str,
    first: Sequence[float] | None = None,
    second: Sequence[float] | None = None,
    *,
    scale: float = 0.0,
    minus_lr: float = 0.0,
    eps: float = 0.0,
    decay: float = 1.0,
    rounding: str = "nearest",
) -> None:
    if not launch.elements:
        return
    place = Place(launch.device)
    try:
        with place.guard:
            table = launch.copies.get(place.stream)
            if table is None:
                table = launch.copies[place.stream] = place.copy(launch.table)
            words = place.host_words(3, len(states))
            counters = [state.counter for state in states]
            compiled.cuda_directions(words.data_ptr(), counters, first, second)
            directions = place.copy(words)
            place.run(
                compiled.CudaJob(
                    operation=OPERATIONS.index(operation),
                    distribution=DISTRIBUTIONS.index(distribution),
                    table=compiled.Table(
                        table.data_ptr(),
                        len(launch.segments),
                        launch.elements,
                        ELEMENT_TYPES.index(launch.dtype),
                    ),
                    seed=states[0].key,
                    offset=states[0].offset,
                    directions=directions.data_ptr(),
                    horizon=len(states),
                    with_second=second is not None,
                    scale=scale,
                    minus_lr=minus_lr,
                    eps=eps,
                    decay=decay,
                    rounding=ROUNDINGS.index(rounding),
                    highs=high_words(launch, states[0].offset),
                )
            )
    except RuntimeError as error:
        raise RuntimeError(
            f"{operation} of {_shapes(launch)} on {launch.device} along {len(states)} "
            f"{distribution} direction(s) failed: {error}. The module was built by "
            f"{native.build_report()['cuda']}"
        ) from error
    native.mark_written(launch)


def high_words(launch: Launch, offset: int) -> list[int]:
    """``index // 2**34`` of the launch's elements."""
    log = _LOG_ELEMENTS_PER_HIGH
    if (offset + launch.last_index) >> log == 0:
        return [0]
    highs: set[int] = set()
    for s in launch.segments:
        begin, end = offset + s.index_offset, offset + s.last_index
        if begin >> log == end >> log:
            highs.add(begin >> log)
            continue
        for row in range(begin, end + 1, s.index_stride or s.row_length):
            highs.update(range(row >> log, ((row + s.row_length - 1) >> log) + 1))
    return sorted(highs)


def _shapes(launch: Launch) -> str:
    shapes = [str(tuple(s.tensor.shape)) for s in launch.segments]
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    return f"{launch.dtype} tensors {', '.join(shapes[:3])}{more}"


def sample(plan: Plan, state: PhiloxState, distribution: str) -> None:
    for launch in plan.launches:
        _call(launch, "sample", [state], distribution)


def perturb(plan: Plan, state: PhiloxState, scale: float, distribution: str, rounding: str) -> None:
    for launch in plan.launches:
        _call(launch, "perturb", [state], distribution, scale=scale, rounding=rounding)


def update(
    plan: Plan,
    states: Sequence[PhiloxState],
    first: Sequence[float],
    second: Sequence[float] | None,
    lr: float,
    eps: float,
    decay: float,
    restore: float,
    distribution: str,
    rounding: str,
) -> None:
    for launch in plan.launches:
        _call(
            launch,
            "update",
            states,
            distribution,
            first,
            second,
            scale=restore,
            minus_lr=-lr,
            eps=eps,
            decay=decay,
            rounding=rounding,
        )


def moments(
    plan: Plan,
    states: Sequence[PhiloxState],
    first: Sequence[float],
    second: Sequence[float] | None,
    distribution: str,
    out_m: Sequence[Tensor],
    out_v: Sequence[Tensor],
) -> None:
    for outputs, coefficients, squared in ((out_m, first, False), (out_v, second, True)):
        if coefficients is None:
            for out in outputs:
                out.fill_(1.0)
            continue
        for launch in plan.like(outputs).launches:
            _call(
                launch,
                "moment",
                states,
                distribution,
                coefficients,
                coefficients if squared else None,
            )
