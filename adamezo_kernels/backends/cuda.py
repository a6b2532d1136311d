"""The CUDA kernels of the compiled module, queued on the caller's current stream.

No call waits for what is queued on the device. Besides the weights a kernel reads two tensors:

- the table of segments, copied once for each plan and stream, on a stream of its own whose end is
  waited for: a capture on any stream may use the copy later;
- the words of adamezo_kernels.terms. Words on the device are read there, also by a captured call.
  Words on the host are carried by each launch, among the parameters that CUDA copies when a launch
  is queued: nothing is allocated, and nothing has to outlive it. More than MOST_CARRIED words,
  those of 85 directions or more, are copied for each call, from pinned memory.

Such copies of words are allocated under the current stream and used on no other, so torch's caching
allocators keep their memory until that stream is done with it: the pinned side by the event that a
non-blocking copy records, the device side by the order of the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..plan import Launch
from ..terms import Terms
from . import native
from .native import compiled

NAME = "cuda"

DISTRIBUTIONS: tuple[str, ...] = ("exact", "fast", "rademacher", "lowrank")

MOST_CARRIED = 256
"""A launch carries no more words: kMostCarried of csrc/adamezo/job.h."""

# The elements of a launch have indices that agree above these bits: 2**32 Philox calls of 4 each.
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
    """The place where a launch runs: a device and the current stream of this thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # torch's own guard, as it knows the device to go back to: the runtime that is linked into
        # the module does not.
        self.guard: AbstractContextManager[object] = torch.cuda.device(device)
        self.stream = torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy on the device, without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy for as long as its plan lives, complete when this returns: a capture on any stream
        may use it. It waits for the copy, and for nothing that was queued before."""
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            copy = tensor.to(self.device)
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def run(self, job: Any, highs: Sequence[int]) -> None:
        compiled.cuda_launch(job, highs, self.device.index, self.stream)


def run(call: Call) -> None:
    words = call.terms.words
    carried = len(words) if words.device.type == "cpu" and len(words) <= MOST_CARRIED else 0
    for launch in call.plan.launches:
        if not launch.elements:
            continue
        place = Place(launch.device)
        try:
            with place.guard:
                # References last until the launches: after them their memory may be reused.
                words = words_for(call.terms, place, carried)
                for part, distribution in launch.by_kernel(call.distribution):
                    _run(call, part, distribution, place, words, carried)
        except RuntimeError as error:
            raise RuntimeError(
                f"{failed(call, launch)}: {error}. The module was built by "
                f"{native.build_report()['cuda']}"
            ) from error
        native.mark_written(launch)


def _run(
    call: Call, launch: Launch, distribution: str, place: Place, words: Tensor, carried: int
) -> None:
    tiles, offset = distribution.startswith("lowrank"), call.terms.offset
    table, count = _table(launch, "tiles" if tiles else "windows", offset, place)
    # The kernels that take tiles find the high words themselves.
    highs = [0] if tiles else high_words(launch, offset)
    job = native.job(
        call, launch, table, words, distribution=distribution, count=count, carried=carried
    )
    place.run(job, highs)


def _table(launch: Launch, unit: str, offset: int, place: Place) -> tuple[Tensor, int]:
    """The launch's table on the device with counts of windows or tiles, copied once for each stream
    that it is used on, and the number of all."""
    kind = unit, offset
    found = launch.copies.get((unit, offset, place.stream))
    if found is None and place.capturing():
        # A graph would repeat the copy at each replay, from memory freed long before. Any copy will
        # do, as each was complete when it was made.
        found = next((copy for (*of, _), copy in launch.copies.items() if tuple(of) == kind), None)
        if found is None:
            raise RuntimeError("a capture cannot copy the table: run the same call once before")
    if found is None:
        table = launch.table.clone()
        make = compiled.count_tiles if unit == "tiles" else compiled.count_windows
        count = make(table.data_ptr(), len(table), offset)
        found = launch.copies[unit, offset, place.stream] = place.keep(table), count
    return found


def words_for(terms: Terms, place: Place, carried: int = 0) -> Tensor:
    """The terms' words on the device; or on the host, from where the launches carry them."""
    if terms.words.device.type != "cpu":
        return terms.words
    if place.capturing():
        raise RuntimeError(
            "terms on the host would keep their values at every replay of the capture: expected "
            "Terms on the device (an optimizer with capturable=True)"
        )
    return terms.words if carried else place.copy(terms.words)


def high_words(launch: Launch, offset: int) -> list[int]:
    """The values of ``index // 2**34`` among the launch's elements."""
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


def failed(call: Call, launch: Launch) -> str:
    """The beginning of an error message: which call failed."""
    shapes = [str(tuple(s.tensor.shape)) for s in launch.segments]
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    return (
        f"{call.operation} of {launch.dtype} tensors {', '.join(shapes[:3])}{more} on "
        f"{launch.device} along {call.terms.horizon} {call.distribution} direction(s) failed"
    )
