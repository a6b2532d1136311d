"""The CUDA kernels on a device: `make gpu-check`. The host runs their bodies in
test_cuda_bodies.py; here is what only a device can show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from adamezo_kernels import (
    RULES,
    PhiloxState,
    Plan,
    Terms,
    moments,
    perturb_,
    sample_,
    update_,
    update_terms_,
)
from adamezo_kernels.backends import cuda, native, reference
from adamezo_kernels.stream import ROUNDINGS
from helpers.operations import (
    KEY,
    OFFSET,
    TYPES,
    assert_same_bits,
    coefficients,
    states,
    weights,
)
from helpers.operations import (
    KINDS as ALL_KINDS,
)
from helpers.rules import EPS, LR, NUMBERS, RESTORE, filled, terms_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and cuda.availability()[0]),
        reason=f"needs a CUDA device: {cuda.availability()[1]}",
    ),
]

SAME_BITS = [kind for kind in cuda.DISTRIBUTIONS if kind in reference.DISTRIBUTIONS]
KINDS = [kind for kind in ALL_KINDS if kind.values[0][0] in SAME_BITS]
SIZES = (0, 1, 3, 4097, 2**20 + 3)
ALIGNMENTS = (0, 1, 4, 8)  # elements from an address aligned to 16 bytes


@pytest.fixture
def pair():
    """``pair(numel, dtype, shift)``: the same weights on the host and on the device, there between
    margins of NaN that must stay as they are."""
    made = []

    def make(numel: int, dtype: torch.dtype, shift: int = 0):
        host = weights(numel, dtype, numel + shift)
        buffer = torch.full((numel + 128,), float("nan"), dtype=dtype, device="cuda")
        device = buffer[64 + shift : 64 + shift + numel]
        device.copy_(host)
        made.append((buffer, 64 + shift, numel))
        return host, device

    yield make
    for buffer, start, numel in made:
        assert buffer[:start].isnan().all(), "a kernel wrote before its tensor"
        assert buffer[start + numel :].isnan().all(), "a kernel wrote behind its tensor"


def update(plan: Plan, count: int, with_second: bool, backend: str, **options: str):
    update_(
        plan,
        states(count),
        *coefficients(count, with_second),
        lr=3e-3,
        weight_decay=0.1,
        restore=1e-3,
        backend=backend,
        **options,
    )


@pytest.mark.parametrize("shift", ALIGNMENTS)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_exact_has_the_bits_of_the_cpu(pair, dtype, numel, shift):
    host, device = pair(numel, dtype, shift)
    state = PhiloxState(KEY, 9, OFFSET)
    for tensor, backend in ((host, "native"), (device, "cuda")):
        perturb_(Plan([tensor]), state, -1.7e-3, backend=backend)
    assert_same_bits(device.cpu(), host, "perturb")
    for count in (1, 2, 10, 32):
        for with_second in (True, False):
            update(Plan([host]), count, with_second, "native")
            update(Plan([device]), count, with_second, "cuda")
            assert_same_bits(device.cpu(), host, (count, with_second))
            sums = coefficients(count, with_second)
            expected = moments(Plan([host]), states(count), *sums, backend="native")
            got = moments(Plan([device]), states(count), *sums, backend="cuda")
            for a, b in zip(got, expected, strict=True):
                assert_same_bits(a[0].cpu(), b[0], "moments")
    sample_(host, state, backend="native")
    sample_(device, state, backend="cuda")
    assert_same_bits(device.cpu(), host, "sample")


@pytest.mark.parametrize("shift", ALIGNMENTS)
@pytest.mark.parametrize("numel", [*SIZES[:-1], 70001])
@pytest.mark.parametrize("distribution", SAME_BITS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_stochastic_stores_have_the_bits_of_the_reference(pair, dtype, distribution, numel, shift):
    host, device = pair(numel, dtype, shift)
    options = {"distribution": distribution, "rounding": "stochastic"}
    state = PhiloxState(KEY, 9, OFFSET)
    for tensor, backend in ((host, "reference"), (device, "cuda")):
        perturb_(Plan([tensor]), state, -1.7e-3, backend=backend, **options)
    assert_same_bits(device.cpu(), host, "perturb")
    for with_second in (True, False):
        update(Plan([host]), 3, with_second, "reference", **options)
        update(Plan([device]), 3, with_second, "cuda", **options)
        assert_same_bits(device.cpu(), host, with_second)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_stochastic_stores_along_fast_directions(dtype):
    """Their bits are the device's own; what is made of them is not."""
    host = weights(70001, dtype, 0)
    scale, fast = reference.to_float32(-1.7e-3), {"distribution": "fast", "backend": "cuda"}
    where = {"parameter": 0, "key": KEY, "direction": 9}
    z = sample_(torch.empty(70001, device="cuda"), PhiloxState(KEY, 9, OFFSET), **fast).cpu()
    words = reference.rounding_words(OFFSET, 0, 1, 70001, **where).view(-1)
    value = reference.apply_perturbation(host, z, scale)
    expected = reference.round_stochastically(value, words, dtype)
    device = host.cuda()
    perturb_(Plan([device]), PhiloxState(KEY, 9, OFFSET), scale, rounding="stochastic", **fast)
    assert_same_bits(device.cpu(), expected)


@pytest.mark.parametrize("distribution", cuda.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_stochastic_stores_are_unbiased(dtype, distribution):
    """1 + scale z lies between 1 and a neighbour of it, above or below, and comes out as each of
    them. The mean of what comes out is that of what was stored: off by up to 5 standard deviations
    of a mean of as many numbers, each off by at most a unit of the last place."""
    n, unit = 1 << 24, torch.finfo(dtype).eps
    scale = unit / 16  # |z| is below 6.6
    options = {"distribution": distribution, "backend": "cuda"}
    state = PhiloxState(KEY, 3)
    z = sample_(torch.empty(n, device="cuda"), state, **options).double()
    ones = [torch.ones(n, dtype=dtype, device="cuda") for _ in ROUNDINGS]
    for out, rounding in zip(ones, ROUNDINGS, strict=True):
        perturb_(Plan([out]), state, scale, rounding=rounding, **options)
    nearest, stochastic = (out.double() - 1 for out in ones)
    for chosen in (z > 0, z < 0):
        mean = (scale * z[chosen]).mean()
        bound = 5 * unit / chosen.sum().sqrt()
        assert bound < 0.1 * mean.abs()
        assert (stochastic[chosen].mean() - mean).abs() <= bound
        # While to nearest nothing moves, or in normals only what is far out.
        assert (nearest[chosen].mean() - mean).abs() > bound


def perturb_and_step(plan: Plan, backend: str, terms: Terms, **options: str) -> None:
    perturb_(plan, terms, -RESTORE, backend=backend, **options)
    if RULES[terms.rule].updates:
        update_terms_(plan, terms, eps=EPS, restore=RESTORE, backend=backend, **options)


def buffers_of(rule: str, host: torch.Tensor, pair, dtype: torch.dtype):
    """The same buffers on the host and on the device, there at other alignments than the weights
    and between margins too."""
    kept = []
    for i in range(RULES[rule].buffers):
        on_host, on_device = pair(host.numel(), dtype, 3 * i)
        like = torch.empty(host.shape, dtype=dtype, device="meta")
        on_host.copy_(filled(rule, i, like, i, torch_empty).view(-1))
        on_device.copy_(on_host)
        kept.append((on_host.view(host.shape), on_device.view(host.shape)))
    return [[both[side] for both in kept] for side in (0, 1)]


def torch_empty(numel: int, dtype: torch.dtype, _: int) -> torch.Tensor:
    return torch.empty(numel, dtype=dtype)


@pytest.mark.parametrize("buffer_dtype", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", NUMBERS)
def test_rules_have_the_bits_of_the_reference(pair, rule, kind, dtype, buffer_dtype):
    distribution, rounding = kind
    for numel, shift in ((0, 0), (1, 3), (4097, 0), (4097, 1), (4097, 4), (70001, 8)):
        host, device = pair(numel, dtype, shift)
        kept = buffers_of(rule, host, pair, buffer_dtype)
        for tensor, buffers, backend in ((host, kept[0], "native"), (device, kept[1], "cuda")):
            plan = Plan([tensor]).with_buffers([buffers])
            options = {"distribution": distribution, "rounding": rounding}
            perturb_and_step(plan, backend, terms_of(rule), **options)
        assert_same_bits(device.cpu(), host, (numel, shift))
        for i, (on_host, on_device) in enumerate(zip(*kept, strict=True)):
            assert_same_bits(on_device.cpu(), on_host, (numel, shift, i))


@pytest.mark.parametrize("offset", [0, 2**32 + 3, 2**34 - 700])
@pytest.mark.parametrize("rule", NUMBERS)
def test_rules_over_rows_and_many_tensors(pair, rule, offset):
    """Buffers have no gaps where rows of weights have some."""
    sizes = [(n,) for n in range(1, 1200, 37)]
    host = [weights(n, torch.bfloat16, n) for (n,) in sizes]
    host.append(weights(300 * 517, torch.bfloat16, 0).view(300, 517)[:, 5:505])
    device = [t.cuda() for t in host[:-1]]
    device.append(torch.zeros(300, 517, dtype=torch.bfloat16, device="cuda")[:, 5:505])
    device[-1].copy_(host[-1])
    kept = [buffers_of(rule, t, pair, torch.float16) for t in host]
    states = [PhiloxState(KEY, 7 - k, offset) for k in range(RULES[rule].directions)]
    terms = Terms.of(states, minus_lr=-LR, rule=rule, numbers=NUMBERS[rule])
    for side, (tensors, backend) in enumerate(((host, "native"), (device, "cuda"))):
        plan = Plan(tensors).with_buffers([k[side] for k in kept])
        perturb_and_step(plan, backend, terms, rounding="stochastic")
    for got, expected in zip(device, host, strict=True):
        assert_same_bits(got.cpu(), expected)
    for on_host, on_device in kept:
        for got, expected in zip(on_device, on_host, strict=True):
            assert_same_bits(got.cpu(), expected)


@pytest.mark.parametrize("rule", NUMBERS)
def test_the_numbers_of_a_rule_are_read_when_the_kernel_runs(rule):
    """As a replayed capture needs it: from words on the device that changed since the last call."""
    host = weights(5000, torch.bfloat16, 0)
    device = host.cuda()
    kept = [torch.ones(5000) for _ in range(RULES[rule].buffers)]
    on_device = [buffer.cuda() for buffer in kept]
    words = terms_of(rule)
    terms = Terms(KEY, words.offset, words.horizon, rule=rule, device="cuda")
    plan = Plan([device]).with_buffers([on_device])
    for minus_lr in (-LR, -2 * LR):
        now = terms_of(rule, minus_lr)
        terms.words.copy_(now.words)
        perturb_and_step(plan, "cuda", terms)
        perturb_and_step(Plan([host]).with_buffers([kept]), "native", now)
    assert_same_bits(device.cpu(), host)
    for got, expected in zip(on_device, kept, strict=True):
        assert_same_bits(got.cpu(), expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shifts", [(0, 0), (0, 3), (5, 0), (1, 1), (4, 8)], ids=str)
@pytest.mark.parametrize("numel", [*SIZES[:-1], 70001])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_out_of_place_reads_one_and_writes_the_other(pair, dtype, numel, shifts, rounding):
    host, device = pair(numel, dtype, shifts[0])
    expected, out = pair(numel, dtype, shifts[1])
    for source, target, backend in ((host, expected, "reference"), (device, out, "cuda")):
        target.fill_(float("nan"))
        plan = Plan([source], parameters=[7]).into([target])
        perturb_(plan, PhiloxState(KEY, 9, OFFSET), -1.7e-3, rounding=rounding, backend=backend)
    assert_same_bits(out.cpu(), expected, "written")
    assert_same_bits(device.cpu(), host, "read")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_many_tensors_and_far_offsets(dtype, rounding):
    sizes = (*range(1, 1200, 37), 70001)
    host = [weights(n, dtype, n) for n in sizes]
    host.append(weights(300 * 517, dtype, 0).view(300, 517)[:, 5:505])
    device = [t.cuda() for t in host[:-1]]
    device.append(torch.zeros(300, 517, dtype=dtype, device="cuda")[:, 5:505])
    device[-1].copy_(host[-1])
    outs = [[torch.empty_like(t).contiguous() for t in tensors] for tensors in (host, device)]
    by = {"nearest": "native", "stochastic": "reference"}[rounding]
    for offset in (0, 2**32 + 3, 2**34 - 700):
        state = PhiloxState(KEY, 4, offset)
        perturb_(Plan(host), state, 1e-2, rounding=rounding, backend=by)
        perturb_(Plan(device), state, 1e-2, rounding=rounding, backend="cuda")
        for got, expected in zip(device, host, strict=True):
            assert_same_bits(got.cpu(), expected, offset)
        perturb_(Plan(host).into(outs[0]), state, 1.0, rounding=rounding, backend="reference")
        perturb_(Plan(device).into(outs[1]), state, 1.0, rounding=rounding, backend="cuda")
        for got, expected in zip(outs[1], outs[0], strict=True):
            assert_same_bits(got.cpu(), expected, offset)


def test_many_directions():
    host = weights(5000, torch.bfloat16, 0)
    device = host.cuda()
    # Words of the first are carried by the launch, the others copied; the last needs more shared
    # memory than comes without asking.
    for count in (84, 85, 1024, 3000):
        update(Plan([host]), count, True, "native")
        update(Plan([device]), count, True, "cuda")
        assert_same_bits(device.cpu(), host, count)


def test_more_elements_than_int32_counts():
    numel = 2**31 + 1027
    if torch.cuda.mem_get_info()[0] < 2.5 * numel:
        pytest.skip("needs 5 GB of free device memory")
    w = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    perturb_(Plan([w]), PhiloxState(KEY, 9), 1.0, backend="cuda")
    for start in (0, 2**31 - 512, 2**31, numel - 700):
        expected = torch.zeros(min(1500, numel - start), dtype=torch.bfloat16)
        perturb_(Plan([expected]), PhiloxState(KEY, 9, start), 1.0, backend="native")
        assert_same_bits(w[start : start + len(expected)].cpu(), expected, start)


def test_rademacher_has_the_bits_of_the_reference(pair):
    host, device = pair(70001, torch.bfloat16, 3)
    update(Plan([host]), 5, True, "reference", distribution="rademacher")
    update(Plan([device]), 5, True, "cuda", distribution="rademacher")
    assert_same_bits(device.cpu(), host)


def test_fast_normals_are_near_the_exact_ones():
    """By the bounds of the PTX instructions: with R = sqrt(2 ln2 |log2 u|) and log2 u off by 2^-22
    absolutely (or relatively, where that is more), R^2 is off by 2 ln2 2^-22 max(1, |log2 u|); its
    root within 2^-22, sine and cosine within 2^-20.5, each relative to R. The angle, at most pi, is
    off by 2^-22 by its product."""
    z, exact = (
        sample_(
            torch.empty(1 << 24, device="cuda"),
            PhiloxState(KEY, 3),
            distribution=distribution,
            backend="cuda",
        )
        .double()
        .view(-1, 2)
        for distribution in ("fast", "exact")
    )
    assert z.isfinite().all()
    square = exact.square().sum(1, keepdim=True)
    radius = square.sqrt()
    off_square = 1.3863 * 2.0**-22 * torch.clamp(square / 1.3863, min=1.0)
    off_radius = torch.minimum(off_square.sqrt(), off_square / radius.clamp(min=1e-30))
    bound = off_radius + radius * (2.0**-22 + 2.0**-20.5 + 2.0**-22) + 2e-6
    assert ((z - exact).abs() <= bound).all()
    assert not torch.equal(z, exact)


def test_the_inlined_root_is_correctly_rounded():
    """Every float32 in [2^-25, 22], and 0: all that -ln u can be."""
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    native.compiled.cuda_check_sqrt(wrong.data_ptr(), wrong.device.index, stream)
    assert wrong.item() == 0


def test_a_side_stream_is_kept_to():
    """Work on a side stream sees what was queued there before it, and waits for nothing else."""
    host = weights(1 << 20, torch.float32, 0)
    side = torch.cuda.Stream()
    device = torch.zeros(1 << 20, device="cuda")
    source = host.cuda()
    plan = Plan([device])
    update(plan, 3, True, "cuda")  # loads the kernel, which waits for the device
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)
        device.copy_(source)
        update(plan, 3, True, "cuda")
        assert not side.query(), "the call waited for the device"
    side.synchronize()
    update(Plan([host]), 3, True, "native")
    assert_same_bits(device.cpu(), host)


def test_the_current_device_is_left_as_it_was():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    host = [weights(5000, torch.float32, i) for i in range(2)]
    device = [host[0].to("cuda:0"), host[1].to("cuda:1")]
    torch.cuda.set_device(0)
    update(Plan(device), 3, True, "cuda")
    assert torch.cuda.current_device() == 0
    assert torch.ones(3, device="cuda").device.index == 0
    update(Plan(host), 3, True, "native")
    for got, expected in zip(device, host, strict=True):
        assert_same_bits(got.cpu(), expected)


def test_a_failed_launch_names_everything():
    with pytest.raises(
        RuntimeError, match=r"update of .*\(7,\) on cuda:0 along 100000 exact.*shared"
    ):
        update(Plan([torch.zeros(7, device="cuda")]), 100_000, True, "cuda")
    update(Plan([torch.zeros(7, device="cuda")]), 2, True, "cuda")  # nothing is left of it
    torch.cuda.synchronize()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on PATH or in /usr/local/cuda")
    # torch asks for what may not be there and goes on: those calls are no faults of a kernel.
    command = [sanitizer, "--report-api-errors", "no"]
    code = """
import itertools, torch
from adamezo_kernels import RULES, PhiloxState, Plan, Terms, moments, perturb_, sample_, update_
from adamezo_kernels import update_terms_
s = [PhiloxState(1, k) for k in range(3)]
types = (torch.float32, torch.bfloat16, torch.float16)
kinds = itertools.product(types, ("exact", "fast", "rademacher"), ("nearest", "stochastic"))
for dtype, distribution, rounding in kinds:
    options = dict(distribution=distribution, backend="cuda")
    w = [torch.ones(n, device="cuda", dtype=dtype)[1:] for n in (5, 700, 4099)]
    other = [torch.empty(n, device="cuda", dtype=dtype)[2:] for n in (6, 701, 4100)]
    perturb_(Plan(w), s[0], 1e-3, rounding=rounding, **options)
    perturb_(Plan(w).into(other), s[0], 1e-3, rounding=rounding, **options)
    update_(Plan(w), s, [1., 2., 3.], [1., 2., 3.], lr=1e-3, rounding=rounding, **options)
    update_(Plan(other), s[:1], [1.], None, lr=1e-3, rounding=rounding, **options)
    moments(Plan(w), s, [1., 2., 3.], [1., 2., 3.], **options)
    sample_(w[2], s[1], **options)
    for rule in [rule for rule in RULES if rule != "moments"]:
        like = lambda t: [torch.ones(t.numel(), device="cuda", dtype=types[len(rule) % 3])
                          for _ in range(RULES[rule].buffers)]
        plan = Plan(w).with_buffers([like(t) for t in w])
        terms = Terms.of(s[:RULES[rule].directions], minus_lr=-1e-3, rule=rule, numbers=[0.5] * 2)
        perturb_(plan, terms, 1e-3, rounding=rounding, **options)
        if RULES[rule].updates:
            update_terms_(plan, terms, restore=-1e-3, rounding=rounding, **options)
torch.cuda.synchronize()
"""
    done = subprocess.run(
        [*command, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        # Suballocations of one block would hide what is out of bounds or not initialized.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
