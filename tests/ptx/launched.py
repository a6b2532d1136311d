"""A module whose CUDA kernels run on the CPU (ptx.cmake), in the place of the package's own.

As a plugin of pytest, with the module's path in ADAMEZO_PTX_MODULE:

- tests/gpu/test_cuda_bodies.py launches where it would call the bodies on the host;
- tests/gpu/test_cuda_gpu.py, and whatever else is marked `gpu`, gets CPU tensors where it asks for
  CUDA ones.

Every launch may use the memory of its call's tensors alone. ADAMEZO_PTX_REPORT names a file to
which each process adds what it ran.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PATH = os.environ["ADAMEZO_PTX_MODULE"]
NAME = "adamezo_kernels._native"
assert NAME not in sys.modules, "the package was imported before"
_spec = importlib.util.spec_from_file_location(NAME, PATH)
assert _spec is not None
assert _spec.loader is not None
compiled = sys.modules[NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compiled)

from adamezo_kernels.backends import cuda, native  # noqa: E402

assert native.compiled is compiled, "the package has another module"
machine = ctypes.CDLL(PATH)
on_host = compiled.cuda_on_host  # the bodies, for those who compare with them
REPORT = os.environ.get("ADAMEZO_PTX_REPORT")

# Tests of tests/gpu/test_cuda_gpu.py that are left out, as patterns of their names, and why.
LEFT_OUT = {
    r"test_a_side_stream_is_kept_to": "needs streams",
    r"test_the_current_device_is_left_as_it_was": "needs two devices",
    r"test_compute_sanitizer_finds_nothing": "launches in another process",
    r"test_more_elements_than_int32_counts": "needs more than 4 GiB",
    r"test_exact_has_the_bits_of_the_cpu\[.*-1048579-[148]\]": "takes minutes; shift 0 stays",
}


# --- the memory of a call ------------------------------------------------------------------------


def rows(first: Tensor, length: int, stride: int, count: int, writable: bool) -> Tensor:
    """(begin, end, writable) of each row of a tensor."""
    size = first.element_size()
    begins = first.data_ptr() + stride * size * torch.arange(count)
    return torch.stack([begins, begins + length * size, torch.full_like(begins, writable)], 1)


def whole(tensor: Tensor, writable: bool) -> Tensor:
    return rows(tensor, tensor.numel(), 0, 1, writable)


def allow(ranges: list[Tensor]) -> None:
    table = torch.cat(ranges).contiguous()
    machine.ptx_allow(ctypes.c_void_p(table.data_ptr()), len(table))


def memory_of(call, launch, table: Tensor, words: Tensor | None) -> list[Tensor]:
    """What the launch reads, and of that what it writes: nothing between rows, and nothing else."""
    found = [whole(table, False)]
    if words is not None:
        found.append(whole(words, False))
    for s in launch.segments:
        if not s.elements:
            continue
        found.append(rows(s.tensor, s.row_length, s.row_stride, s.rows, True))
        if s.source is not s.tensor:
            found.append(rows(s.source, s.row_length, s.source_stride, s.rows, False))
        found += [whole(buffer, call.operation == "update") for buffer in s.buffers]
    return found


_job = native.job


def job_with_memory(call, launch, table: Tensor, words: Tensor, carried: int = 0, **options):
    allow(memory_of(call, launch, table, None if carried else words))
    return _job(call, launch, table, words, carried=carried, **options)


native.job = job_with_memory


# --- launches ------------------------------------------------------------------------------------


def launch(job, highs, blocks: int = 1, threads: int = 1) -> None:
    """On a device of that many multiprocessors, in an order of threads that the numbers choose."""
    machine.ptx_set(blocks, threads)
    compiled.cuda_launch(job, highs, 0, 0)


class Place:
    """Stands in for a device of cuda.Place."""

    guard = nullcontext()
    stream = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def capturing(self) -> bool:
        return False

    def copy(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    keep = copy

    def run(self, job, highs) -> None:
        launch(job, highs)


def stand_in(setattr_=setattr) -> None:
    """Backend "cuda" takes CPU tensors from now on."""
    setattr_(cuda, "Place", Place)
    setattr_(cuda, "supports", lambda device: True)


def check_sqrt(count: int, device: object, stream: int) -> None:
    allow([torch.tensor([[count, count + 8, 1]])])
    _check_sqrt(count, 0, stream)


class CpuForCuda(TorchFunctionMode):
    """CPU tensors where CUDA tensors are asked for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        if function in (Tensor.cuda, Tensor.cpu):
            return args[0].clone()
        return function(*args, **kwargs)


# --- the plugin ----------------------------------------------------------------------------------

_check_sqrt = compiled.cuda_check_sqrt
compiled.cuda_check_sqrt = check_sqrt
compiled.cuda_on_host = launch
# The module finds a device, and so does torch from here on; it asks nothing else of it.
torch.cuda.is_available = lambda: True
torch.version.cuda = torch.version.cuda or "13.0"


@pytest.fixture(autouse=True)
def cpu_for_cuda(request, monkeypatch):
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    stand_in(monkeypatch.setattr)
    said = cuda.failed
    monkeypatch.setattr(cuda, "failed", lambda *of: said(*of).replace(" on cpu ", " on cuda:0 "))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    with CpuForCuda():
        yield


def pytest_collection_modifyitems(config, items):
    left_out = []
    if any(item.get_closest_marker("gpu") for item in items):
        for pattern in LEFT_OUT:
            found = [item for item in items if re.match(pattern, item.name)]
            assert found, f"there is no test {pattern}"
            left_out += found
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def report() -> None:
    if REPORT:
        assert machine.ptx_report(REPORT.encode()) == 0, f"cannot write {REPORT}"


def pytest_sessionfinish():
    report()
