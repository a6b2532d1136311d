"""Fixtures that tests of several folders share; functions that they share are in helpers/."""

from __future__ import annotations

import pytest
import torch

from adamezo_kernels.backends import native
from helpers.backends import INSTRUCTION_SETS, needs_native


@pytest.fixture(params=INSTRUCTION_SETS or [pytest.param("none", marks=needs_native)])
def isa(request):
    """Runs the test once for each instruction set of this machine, the kernels held to it."""
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Tests use one thread unless they ask for more: small tensors gain nothing from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def guarded():
    """``guarded(numel, dtype, offset=0)``: a NaN-filled tensor between two NaN-filled margins.

    ``offset`` moves it by that many elements from an address aligned to 64 bytes. After the test
    the margins must still hold every bit that they were given, so a kernel that writes outside its
    tensor fails the test, and one that leaves an element out leaves a NaN.
    """
    buffers = []

    def make(numel: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        margin = 64
        buffer = torch.full((2 * margin + 64 + numel,), float("nan"), dtype=dtype)
        to_aligned = -buffer.data_ptr() % 64 // buffer.element_size()
        start = margin + to_aligned + offset
        assert offset + to_aligned <= 64
        buffers.append((buffer, start, start + numel))
        return buffer[start : start + numel]

    yield make
    for buffer, start, stop in buffers:
        fresh = torch.full((1,), float("nan"), dtype=buffer.dtype)
        bits = {2: torch.int16, 4: torch.int32}[buffer.element_size()]
        pattern = fresh.view(bits)
        for margin_part in (buffer[:start], buffer[stop:]):
            assert torch.equal(margin_part.view(bits), pattern.expand(margin_part.shape)), (
                "a kernel wrote outside its tensor"
            )


# Of the job on a tiny model. What imports transformers is imported here, as the tests of kernels
# run where it is not installed.


@pytest.fixture
def tokenizer():
    from helpers.jobs import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    from adamezo.integrations import transformers as language_models
    from helpers.jobs import llama

    language_models.save(llama(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data_file(tmp_path):
    from helpers.jobs import write_reviews

    return write_reviews(tmp_path / "data.csv")
