"""Tensors in every memory layout have the bits of their contiguous copies, and those that overlap
are refused."""

from __future__ import annotations

import gc
import itertools
import math
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from adamezo import AdaMeZO, ZOAdam, ZOAdaMU
from adamezo.runlog import StepLog, optimizer_for, read, replay
from adamezo_kernels import (
    RULES,
    PhiloxState,
    Plan,
    Shard,
    perturb_,
    sample_,
    update_,
    update_terms_,
)
from adamezo_kernels import staging as staging_of
from adamezo_kernels.backends import native
from helpers.backends import BACKENDS, INSTRUCTION_SETS, needs_native
from helpers.operations import (
    KEY,
    KINDS,
    TYPES,
    assert_same_bits,
    coefficients,
    run_moments,
    run_perturb,
    run_update,
    states,
    weights,
)
from helpers.rules import EPS, RESTORE, filled, terms_of

both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_types = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def engine(request):
    """Each backend, and of the compiled one each instruction set."""
    if request.param == "reference":
        yield "reference"
    else:
        with native.use_isa(request.param):
            yield "native"


@pytest.fixture(params=[2**20, 64], ids=["whole", "in blocks"])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(staging_of, "BLOCK", request.param)
    return request.param


# --- a tensor of every layout -------------------------------------------------------------------

# A shape, and a tensor of it whose elements are not rows, from what makes memory of some length.
LAYOUTS = {
    "transposed": ((11, 23), lambda m: m(11 * 23).view(23, 11).t()),
    "channels last": ((4, 3, 5, 6), lambda m: m(360).view(4, 5, 6, 3).permute(0, 3, 1, 2)),
    "permuted": ((7, 5, 6), lambda m: m(7 * 5 * 6).view(5, 6, 7).permute(2, 0, 1)),
    "turned around": ((3, 4, 5, 2), lambda m: m(120).view(2, 5, 4, 3).permute(3, 2, 1, 0)),
    "long rows": ((2, 300), lambda m: m(2 * 300).view(300, 2).t()),
    "one long column": ((300, 1, 2), lambda m: m(2 * 300).view(2, 1, 300).permute(2, 1, 0)),
    "two strides": ((4, 3, 2), lambda m: m(4 * 6 * 8).view(4, 6, 8)[:, ::2, ::4]),
    "columns of a transposed one": ((23, 5), lambda m: m(11 * 23).view(11, 23)[3:8].t()),
    "steps in both": ((6, 9), lambda m: m(18 * 12).view(18, 12)[::2, ::2].t()),
    "interleaved": ((3, 2), lambda m: m(8).as_strided((3, 2), (2, 3))),
}  # fmt: skip


def pairs(dtype: torch.dtype, guarded) -> tuple[list[Tensor], list[Tensor]]:
    """One tensor of each layout, between two that are rows, and contiguous copies of all."""
    tensors = [guarded(37, dtype, 3)]
    for i, (shape, make) in enumerate(LAYOUTS.values()):
        tensor = make(lambda n, offset=i % 5: guarded(n, dtype, offset))
        assert tensor.shape == shape
        tensors.append(tensor)
    tensors += [guarded(0, dtype).view(5, 0).t(), guarded(13 * 20, dtype, 1).view(13, 20)[:, 4:9]]
    for seed, tensor in enumerate(tensors):
        tensor.copy_(weights(tensor.numel(), dtype, seed).view(tensor.shape))
    copies = [guarded(t.numel(), dtype, 7 - i % 8).view(t.shape) for i, t in enumerate(tensors)]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return tensors, copies


def shards(tensors: list[Tensor]) -> list[Shard | None]:
    """Pieces of parameters whose rows are the tensor's own, parts of them, and several of them."""
    made: list[Shard | None] = []
    for i, tensor in enumerate(tensors):
        rows = [n for n in range(2, 40) if tensor.numel() and tensor.numel() % n == 0][:: i % 2 + 1]
        length = tensor.numel() // rows[-1] if rows else 0
        made.append(
            Shard(7, rows[-1], length + 2**33 + i, columns=length + 2**33 + i)
            if rows and i % 4
            else Shard(2**34 - 5 * i, columns=5 * i)
        )
    return made


def same(tensors: list[Tensor], copies: list[Tensor], what: object = "") -> None:
    for i, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
        assert_same_bits(tensor, copy, (what, i))


# --- operations -----------------------------------------------------------------------------------


def test_the_layouts_are_staged():
    """What these tests are about: none of the layouts is rows, and most are several blocks."""
    for name, (_, make) in LAYOUTS.items():
        (segment,) = Plan([make(lambda n: torch.zeros(n))])
        assert segment.staged, name
        assert segment.elements > 64 or name in ("two strides", "steps in both", "interleaved")
    for tensor in (torch.zeros(6, 8)[:, ::2], torch.zeros(6, 8)[:, 2:5], torch.zeros(5)[::3]):
        assert not Plan([tensor]).segments[0].staged  # rows, of one element or more


@all_types
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [False, True], ids=["", "shards"])
def test_perturbations_and_updates(engine, guarded, block, dtype, kind, sharded):
    tensors, copies = pairs(dtype, guarded)
    layout = {"shards": shards(tensors) if sharded else None, "parameters": range(5, 18)}
    for members in (tensors, copies):
        plan = Plan(members, **layout)
        run_perturb(plan, kind, engine)
        run_update(plan, (3, True, 1e-3, 0.1), engine, kind)
        run_update(plan, (1, False, 0.0, 0.0), engine, kind)
    same(tensors, copies, kind)


@all_types
@pytest.mark.parametrize("distribution", native.DISTRIBUTIONS)
def test_samples(engine, guarded, block, dtype, distribution):
    tensors, copies = pairs(dtype, guarded)
    for members in (tensors, copies):
        for i, tensor in enumerate(members):
            tensor.fill_(math.nan)  # which is overwritten unread
            state = PhiloxState(KEY, 9, 2**34 - 50 + i)
            sample_(tensor, state, parameter=i, distribution=distribution, backend=engine)
    same(tensors, copies)


@pytest.mark.parametrize("distribution", native.DISTRIBUTIONS)
def test_moments(engine, guarded, block, distribution):
    tensors, copies = pairs(torch.bfloat16, guarded)
    layout = {"shards": shards(tensors), "parameters": range(5, 18)}
    before = [tensor.clone() for tensor in tensors]
    got = run_moments(Plan(tensors, **layout), 3, True, distribution, engine)
    expected = run_moments(Plan(copies, **layout), 3, True, distribution, engine)
    for mine, theirs in zip(got, expected, strict=True):
        assert [m.shape for m in mine] == [t.shape for t in tensors]
        same(mine, theirs)
    same(tensors, before)


@all_types
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
@pytest.mark.parametrize("sharded", [False, True], ids=["", "shards"])
def test_from_one_layout_into_another(engine, guarded, block, dtype, kind, sharded):
    """Into the same layout, contiguous memory, another order of dimensions and rows, and back."""
    tensors, copies = pairs(dtype, guarded)
    layout = {"shards": shards(tensors) if sharded else None}
    alike = [torch.full_like(tensor, math.nan) for tensor in tensors]
    contiguous = [torch.full(tensor.shape, math.nan, dtype=dtype) for tensor in tensors]
    turned = [torch.full(t.shape[::-1], math.nan, dtype=dtype).permute(*range(t.dim())[::-1])
              for t in tensors]  # fmt: skip
    rows = [torch.full((*t.shape[:-1], t.shape[-1] + 3), math.nan, dtype=dtype)[..., :-3]
            for t in tensors]  # fmt: skip
    before = [tensor.clone() for tensor in tensors]
    for source in (tensors, copies):
        for target in (alike, contiguous, turned, rows):
            for tensor in target:
                tensor.fill_(math.nan)
            run_perturb(Plan(source, **layout).into(target), kind, engine)
            if target is not alike or source is not tensors:
                same(target, alike, (source is tensors, target is turned))
            same(source, before, "a source was written")
    run_perturb(Plan(copies, **layout), kind, engine)
    same(alike, copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "moments"])
@pytest.mark.parametrize("sharded", [False, True], ids=["", "shards"])
def test_rules_with_buffers(engine, guarded, block, rule, dtype, sharded):
    ends = []
    for members in pairs(dtype, guarded):
        like = [torch.empty(t.shape, dtype=torch.bfloat16, device="meta") for t in members]
        buffers = [
            [filled(rule, i, b, 2 * k + i, guarded) for i in range(RULES[rule].buffers)]
            for k, b in enumerate(like)
        ]
        plan = Plan(members, shards=shards(members) if sharded else None).with_buffers(buffers)
        out = [torch.full_like(tensor, math.nan) for tensor in members]
        perturb_(plan.into(out), terms_of(rule), RESTORE, backend=engine)
        perturb_(plan, terms_of(rule), -RESTORE, rounding="stochastic", backend=engine)
        versions = [buffer._version for kept in buffers for buffer in kept]
        if RULES[rule].updates:
            update_terms_(
                plan, terms_of(rule), eps=EPS, restore=RESTORE, rounding="stochastic",
                backend=engine,
            )  # fmt: skip
            flat = [buffer for kept in buffers for buffer in kept if buffer.numel()]
            assert all(b._version > v for b, v in zip(flat, versions, strict=False))
        ends.append([*members, *out, *(buffer for kept in buffers for buffer in kept)])
    same(*ends)


@both_backends
def test_types_mix_with_rows_and_each_other(backend, block):
    ends = []
    for order in (False, True):
        tensors = [weights(40 * 9, dtype, 1).view(40, 9) for dtype in (*TYPES, *TYPES)]
        tensors = [t.t().contiguous().t() if order and i % 4 else t for i, t in enumerate(tensors)]
        run_update(Plan(tensors), (2, True, 1e-3, 0.1), backend)
        ends.append(tensors)
    same(*ends)


@both_backends
def test_rows_of_a_shard_that_are_not_those_in_memory(backend, guarded):
    """Five rows of memory, as two and a half of the parameter each."""
    wide = guarded(10 * 9, torch.float32).view(10, 9)
    wide.copy_(weights(90, torch.float32, 2).view(10, 9))
    got = wide[:, 2:8]
    copy = got.contiguous()
    for tensor in (got, copy):
        plan = Plan([tensor], shards=[Shard(3, 4, 1000)])
        run_update(plan, (2, True, 1e-3, 0.1), backend)
    assert_same_bits(got, copy)
    assert wide[:, :2].isfinite().any()


@both_backends
def test_random_permutations(backend, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        dimensions = trial % 5 + 1
        shape = torch.randint(1, 7, (dimensions,), generator=generator).tolist()
        order = torch.randperm(dimensions, generator=generator).tolist()
        steps = torch.randint(1, 3, (dimensions,), generator=generator).tolist()
        monkeypatch.setattr(staging_of, "BLOCK", (2**20, 1, 5, 33)[trial % 4])
        whole = torch.randn([n * k for n, k in zip(shape, steps, strict=True)], generator=generator)
        tensor = whole[tuple(slice(None, None, k) for k in steps)].permute(order)
        copy = tensor.contiguous().clone()
        others = whole.clone()
        for weight in (tensor, copy):
            run_update(
                Plan([weight]), (2, True, 1e-3, 0.1), backend, KINDS[trial % len(KINDS)].values[0]
            )
        assert_same_bits(tensor, copy, (shape, order, steps))
        changed = int((whole != others).sum())
        assert changed <= tensor.numel()  # what lies between is left alone


# --- what autograd and inference mode see -------------------------------------------------------


@both_backends
def test_writes_are_counted_and_reads_are_not(backend, block):
    weight = nn.Parameter(torch.ones(40, 9).t())
    loss = (weight * weight).sum()
    version = weight._version
    out = torch.empty_like(weight)
    perturb_(Plan([weight]).into([out]), PhiloxState(1, 2), 1.0, backend=backend)
    assert weight._version == version
    loss.backward()
    assert weight.grad is not None
    loss = (weight * weight).sum()
    perturb_(Plan([weight]), PhiloxState(1, 2), 1.0, backend=backend)
    assert weight._version > version
    assert weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both_backends
def test_inference_mode_at_any_time(backend):
    expected = torch.zeros(6, 4)
    perturb_(Plan([expected]), PhiloxState(1, 2), 1.0, backend=backend)
    for inside in itertools.product([False, True], repeat=3):
        with torch.inference_mode(inside[0]):
            weight = torch.zeros(4, 6).t()
        plan = Plan([weight])
        with torch.inference_mode(inside[1]):
            perturb_(plan, PhiloxState(1, 2), 1.0, backend=backend)
        with torch.inference_mode():
            weight.zero_()
        with torch.inference_mode(inside[2]):
            perturb_(plan, PhiloxState(1, 2), 1.0, backend=backend)
        assert_same_bits(weight.clone(), expected, inside)


# --- memory -------------------------------------------------------------------------------------


def test_blocks_tile_a_tensor_in_order(monkeypatch):
    monkeypatch.setattr(staging_of, "BLOCK", 50)
    for shape in ((3, 4, 60), (7, 9), (1000,), (120, 2, 1), (1, 1, 130), (2, 3)):
        tensor = torch.arange(math.prod(shape)).view(shape)
        found = list(staging_of.blocks_of(tensor))
        assert torch.equal(torch.cat([block.reshape(-1) for block in found]), tensor.view(-1))
        assert all(block.numel() <= 50 for block in found)
        # No more than twice as many as there have to be, of a tensor with small rows.
        assert len(found) <= 2 * -(-tensor.numel() // 50)


@needs_native
def test_the_memory_for_copies_is_bounded_and_kept(monkeypatch):
    monkeypatch.setattr(staging_of, "BLOCK", 1000)
    tensors = [torch.ones(40, 500).t(), torch.ones(7, 30).t(), torch.ones(9, 5000).half().t()]
    plan = Plan(tensors)
    assert plan.staging.bytes == 0
    perturb_(plan, PhiloxState(1, 2), 1.0)
    assert plan.staging.bytes == 1000 * 4 + 1000 * 2
    (batches,) = plan.batches.values()
    for batch in batches:
        assert batch.plan.elements <= 1000
    perturb_(plan, PhiloxState(1, 2), 1.0)
    assert [*plan.batches.values()] == [batches]  # with their tables, as a captured step needs them
    small = Plan([torch.ones(7, 30).t()])
    perturb_(small, PhiloxState(1, 2), 1.0)
    assert small.staging.bytes == 224 * 4


@needs_native
def test_small_tensors_are_worked_on_together(monkeypatch):
    calls = []
    run = native.run

    def counted(call):
        calls.append(sum(len(launch.segments) for launch in call.plan.launches))
        run(call)

    monkeypatch.setattr(native, "run", counted)
    tensors = [torch.ones(n, 3).t() for n in range(2, 60)]
    perturb_(Plan([*tensors, torch.ones(5)]), PhiloxState(1, 2), 1.0)
    assert calls == [1, 58]


@needs_native
def test_a_capture_uses_what_was_made_on_another_stream(monkeypatch):
    plan = Plan([torch.ones(7, 30).t()])
    stream = [1]
    monkeypatch.setattr(staging_of, "_stream", lambda device: stream[0])
    perturb_(plan, PhiloxState(1, 2), 1.0)
    (first,) = plan.batches.values()
    stream[0] = 2
    with monkeypatch.context() as capturing:
        capturing.setattr(staging_of, "capturing", lambda device: True)
        assert staging_of.batches(plan) is first
    assert staging_of.batches(plan) is not first  # two streams never share what a third frees
    assert len(plan.batches) == 2


def test_a_plan_goes_with_its_last_user():
    weight = torch.ones(7, 30).t()
    plan = Plan([weight, torch.ones(3)])
    perturb_(plan, PhiloxState(1, 2), 1.0)
    watch = ref(plan)
    gc.disable()
    try:
        del plan
        assert watch() is None  # its weights are not kept until Python looks for cycles
    finally:
        gc.enable()


# --- what shares memory -------------------------------------------------------------------------


@both_backends
def test_neighbours_in_other_orders(backend):
    """Pieces of one transposed matrix: their addresses interleave, and no element is in two."""
    whole = torch.zeros(12, 30)
    pieces = [whole.t()[:9], whole.t()[9:20], whole.t()[20:]]
    perturb_(Plan(pieces), PhiloxState(1, 2), 1.0, backend=backend)
    assert whole.ne(0).all()
    again = torch.zeros(12, 30)
    for i, piece in enumerate((again.t()[:9], again.t()[9:20], again.t()[20:])):
        copy = piece.contiguous()
        perturb_(Plan([copy], parameters=[i]), PhiloxState(1, 2), 1.0, backend=backend)
        piece.copy_(copy)
    assert_same_bits(whole, again)


def test_tensors_that_share_memory_are_refused():
    whole = torch.zeros(12, 30)
    cube = torch.zeros(4, 5, 6)
    for a, b in [
        (whole, whole.t()),
        (whole.t(), whole.t()),
        (whole[3], whole.t()),
        (whole[:, 4:9].t(), whole[:, 8:10]),
        (cube.permute(2, 0, 1), cube[3, 4, 5:]),
        (cube.permute(2, 0, 1), cube[0, 0, :1]),
    ]:
        for first, second in ((a, b), (b, a)):
            with pytest.raises(ValueError, match="share memory") as raised:
                Plan([first, torch.zeros(3), second], names=["up", "other", "down"])
            assert "up" in str(raised.value)
            assert "down" in str(raised.value)
    with pytest.raises(ValueError, match="share memory"):
        Plan([whole.t()]).into([whole.t()])
    with pytest.raises(ValueError, match="share memory"):
        Plan([whole.t()]).with_buffers([[whole.view(30, 12)]])


def test_neighbours_in_memory_are_fine():
    memory = torch.zeros(100)
    Plan([memory[:24].view(4, 6).t(), memory[24:], torch.zeros(3)])
    Plan([memory[70:100].view(5, 6).t(), memory[:70].view(7, 10).t()])


# --- optimizers -----------------------------------------------------------------------------------


class Sums(nn.Module):
    """Its output has the same bits in every layout of its weights: they are read in one order."""

    def __init__(self, turned: bool, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = (8, 3, 3, 3), (6, 8, 3, 3), (19, 16), (16,)
        own = [(0.1 * torch.randn(s, generator=generator)).to(dtype) for s in shapes]
        if turned:
            own[:2] = [w.contiguous(memory_format=torch.channels_last) for w in own[:2]]
            own[2] = own[2].t().contiguous().t()
        self.convolutions = nn.ParameterList(own[:2])
        self.matrix, self.bias = nn.Parameter(own[2]), nn.Parameter(own[3])

    def forward(self) -> Tensor:
        return sum(
            (p.contiguous().double() * torch.linspace(-1, 1, p.numel()).view(p.shape)).sum().cos()
            for p in (*self.convolutions, self.matrix, self.bias)
        )


def taken(model: nn.Module, make, steps: int, perturbation: str):
    optimizer = make(model, seed=5, perturbation=perturbation)
    losses = []
    for _ in range(steps):
        optimizer.step(model)
        losses.append(optimizer.losses)
    return optimizer, losses


METHODS = {
    "AdaMeZO": lambda model, **options: AdaMeZO.for_model(model, lr=1e-2, **options),
    "ZOAdam": lambda model, **options: ZOAdam.for_model(model, lr=1e-2, **options),
    "ZOAdam, 16 bits": lambda model, **options: ZOAdam.for_model(
        model, lr=1e-2, buffer_dtype="bfloat16", **options
    ),
    "ZOAdaMU": lambda model, **options: ZOAdaMU.for_model(
        model, lr=1e-2, warmup=1, anneal=3, **options
    ),
}


@all_types
@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
@pytest.mark.parametrize("fused", [False, pytest.param(None, marks=needs_native)])
@pytest.mark.parametrize("method", METHODS)
def test_five_steps_are_those_of_contiguous_weights(method, perturbation, fused, dtype):
    ends = []
    for turned in (False, True):
        model = Sums(turned, dtype)
        start = [p.detach().clone() for p in model.parameters()]
        strides = [p.stride() for p in model.parameters()]
        optimizer, losses = taken(
            model, lambda m, **o: METHODS[method](m, fused=fused, **o), 5, perturbation
        )
        assert [p.stride() for p in model.parameters()] == strides
        assert all((p != s).any() for p, s in zip(model.parameters(), start, strict=True))
        kept = [b for p in model.parameters() for b in optimizer.state[p].values()]
        ends.append((losses, [*model.parameters(), *kept]))
    (losses, expected), (again, got) = ends
    assert losses == again
    same([t.detach() for t in got], [t.detach() for t in expected])


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
@pytest.mark.parametrize("method", ["AdaMeZO", "ZOAdam"])
def test_state_and_log_know_no_layout(method, perturbation, tmp_path):
    """Half of a run with contiguous weights, the rest with others, and a replay on the first."""
    make = METHODS[method]
    model, other = Sums(False, torch.bfloat16), Sums(True, torch.bfloat16)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make(model, seed=5, perturbation=perturbation)
    with StepLog.create(tmp_path / "log", optimizer):
        for _ in range(2):
            optimizer.step(model)
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    second = make(other, seed=6, perturbation=perturbation)
    second.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        optimizer.step(model)
        second.step(other)
    same([p.detach() for p in other.parameters()], [p.detach() for p in model.parameters()])

    third = Sums(True, torch.bfloat16)
    logged = make(third, seed=5, perturbation=perturbation)
    with StepLog.create(tmp_path / "other", logged):
        for _ in range(5):
            logged.step(third)
    same([p.detach() for p in third.parameters()], [p.detach() for p in model.parameters()])
    assert read(tmp_path / "other").header.base == read(tmp_path / "log").header.base
    log = read(tmp_path / "other")
    replay(log, optimizer_for(log.header, start))
    same([*start.values()], [p.detach() for p in model.parameters()])
    turned = dict(Sums(True, torch.bfloat16).named_parameters())
    plain = {name: p.detach() for name, p in turned.items()}
    replay(log, optimizer_for(log.header, plain))
    same([*plain.values()], [p.detach() for p in model.parameters()])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 7)
        self.head.weight = nn.Parameter(self.head.weight.detach().t().contiguous().t())
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3))).square().mean()


def test_exact_copies_have_the_strides_of_their_weights():
    """By which torch chooses its kernels, so that the first loss is the same to the bit. Later ones
    are not: in place, theta - mu z is made from theta + mu z."""
    torch.manual_seed(0)
    model = Convolutions()
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    seen: dict[str, tuple[int, ...]] = {}
    strides = {name: p.stride() for name, p in model.named_parameters()}
    assert strides["head.weight"] == (1, 7)
    assert not model.first.weight.is_contiguous()

    def look(module, *_) -> None:
        seen.update((n, p.stride()) for n, p in model.named_parameters() if n in own[module])

    own = {m: {f"{n}.{k}" for k, _ in m.named_parameters()} for n, m in model.named_children()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = {}
    for perturbation in ("inplace", "out_of_place"):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        optimizer = AdaMeZO.for_model(model, lr=0.0, seed=3, perturbation=perturbation)
        handles = [child.register_forward_pre_hook(look) for child in own]
        optimizer.step(lambda: model(x))
        losses[perturbation] = optimizer.losses[0]
        for handle in handles:
            handle.remove()
        assert seen == strides
        seen.clear()
    assert losses["inplace"] == losses["out_of_place"]
    assert not any((p != start[name]).any() for name, p in model.named_parameters())


def test_the_scratch_of_exact_perturbation_stays_what_it_is():
    """All modules share the memory for staged copies, and views of it are in nobody's hands."""
    torch.manual_seed(0)
    model = Convolutions()
    x = torch.randn(2, 3, 9, 9)
    optimizer = AdaMeZO.for_model(model, lr=1e-3, seed=3, perturbation="out_of_place")
    optimizer.step(lambda: model(x))
    after_one = optimizer.scratch_bytes

    def room(*tensors: Tensor) -> int:
        return sum(-(-t.nbytes // 64) * 64 for t in tensors)

    copies = room(model.first.weight, model.first.bias)
    staged = -(-model.first.weight.numel() // 32) * 32 * 4
    assert after_one == copies + staged
    for _ in range(4):
        optimizer.step(lambda: model(x))
    assert optimizer.scratch_bytes == after_one


@both_backends
def test_a_perturbation_is_taken_back(backend):
    """A closure that fails, in place: the layout changes nothing of what comes back."""
    weight = nn.Parameter(torch.ones(30, 40).t())
    optimizer = AdaMeZO([weight], lr=1e-2, seed=1, fused=backend != "reference")

    def closure() -> float:
        if (weight < 1).any():
            raise KeyError("on the way")
        return 0.0

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert torch.allclose(weight, torch.ones(40, 30), rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="written to parameter 0"):
        optimizer.step(lambda: float(weight.detach().t().mul_(2).sum()))


def test_coefficients_reach_staged_tensors():
    """Against the formula: what left them out would agree with itself in every layout."""
    weight, lr = torch.zeros(40, 9).t(), 0.25
    z = [sample_(torch.empty(9, 40), state) for state in states(2)]
    first, _ = coefficients(2, False)
    update_(Plan([weight]), states(2), first, None, lr=lr)
    expected = -lr * (first[0] * z[0].double() + first[1] * z[1].double())
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)
