"""The CUDA kernels of the compiled module, queued on the caller's current stream.

No call waits for the device. What a kernel reads besides the weights gets there in two tensors:

- the table of segments, copied once for each plan and stream;
- the numbers of adamezo_kernels.terms. Those on the host are copied for each call: one small copy
  from pinned memory serves any number of directions, where kernel parameters would end at 4 KB.
  Those on the device are read there, also by a captured call.

What is copied is allocated under the current stream and used on no other, so torch's caching
allocators keep it until that stream is done with it: the pinned side by the event that a
non-blocking copy records, the device side by the order of the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..plan import Launch, Plan
from ..terms import Terms
from . import native
from .native import compiled

NAME = "cuda"

DISTRIBUTIONS = ("exact", "fast", "rademacher")
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
        self.guard: AbstractContextManager[object] = torch.cuda.device(device)
        self.stream = torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy on the device, without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def run(self, call: Any, highs: Sequence[int]) -> None:
        compiled.cuda_launch(call, highs, self.device.index, self.stream)


def run(
    operation: str,
    plan: Plan,
    terms: Terms,
    distribution: str,
    *,
    scale: float = 0.0,
    eps: float = 0.0,
    rounding: str = "nearest",
) -> None:
    for launch in plan.launches:
        if not launch.elements:
            continue
        place = Place(launch.device)
        try:
            with place.guard:
                # Both are kept until the launch: their memory may then be given to another.
                table, words = _table(launch, place), words_for(terms, place)
                call = native.call(
                    launch,
                    operation,
                    terms,
                    distribution,
                    table=table,
                    words=words,
                    scale=scale,
                    eps=eps,
                    rounding=rounding,
                )
                place.run(call, high_words(launch, terms.offset))
        except RuntimeError as error:
            raise RuntimeError(
                f"{operation} of {shapes(launch)} on {launch.device} along {terms.horizon} "
                f"{distribution} direction(s) failed: {error}. The module was built by "
                f"{native.build_report()['cuda']}"
            ) from error
        native.mark_written(launch)


def _table(launch: Launch, place: Place) -> Tensor:
    """The launch's table on the device, copied once for each stream that it is used on."""
    table = launch.copies.get(place.stream)
    if table is None and place.capturing():
        # A graph would copy it again at each replay, from memory that is long gone. Before a
        # capture the device has come to rest, so that a copy made on any stream is there.
        table = next(iter(launch.copies.values()), None)
        if table is None:
            raise RuntimeError("nothing can be prepared during a capture: do the same once before")
    if table is None:
        table = launch.copies[place.stream] = place.copy(launch.table)
    return table


def words_for(terms: Terms, place: Place) -> Tensor:
    """The terms' words on the device."""
    if terms.words.device.type != "cpu":
        return terms.words
    if place.capturing():
        raise RuntimeError(
            "numbers on the host would stay what they are at every replay of the capture: expected "
            "Terms on the device (an optimizer with capturable=True)"
        )
    return place.copy(terms.words)


def high_words(launch: Launch, offset: int) -> list[int]:
    """``index // 2**34`` of the launch's elements."""
    log = _LOG_ELEMENTS_PER_HIGH
    if (offset + launch.last_index) >> log == 0:
        return [0]
    highs: set[int] = set()
    for s in launch.segments:
        if not s.elements:
            continue  # it has no last index, and rows of no length to step by
        begin, end = offset + s.index_offset, offset + s.last_index
        if begin >> log == end >> log:
            highs.add(begin >> log)
            continue
        for row in range(begin, end + 1, s.index_stride or s.row_length):
            highs.update(range(row >> log, ((row + s.row_length - 1) >> log) + 1))
    return sorted(highs)


def shapes(launch: Launch) -> str:
    shapes = [str(tuple(s.tensor.shape)) for s in launch.segments]
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    return f"{launch.dtype} tensors {', '.join(shapes[:3])}{more}"
