"""Exact perturbation: modules read theta + c z, bit for bit what moving theta would have shown,
while theta is never written; and what cannot be shown perturbed is refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from adamezo import AdaMeZO, fused_adamezo_step, optimizer_of
from adamezo.engine.perturb import readers
from adamezo_kernels import PhiloxState, Plan, perturb_, update_
from helpers.backends import BACKENDS
from helpers.models import (
    MODELS,
    MORE_MODELS,
    TOKENS,
    Shared,
    Symmetric,
    apply,
    built,
    encoder,
    inputs,
    llama,
    parametrized,
)

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED, ZO_EPS = 5, 1e-2


def make(model: nn.Module, **options) -> AdaMeZO:
    return AdaMeZO.for_model(
        model, **{"perturbation": "out_of_place", "seed": SEED, "zo_eps": ZO_EPS, **options}
    )


def loss_of(model: nn.Module, run=apply, seen: list | None = None):
    def closure() -> torch.Tensor:
        result = run(model)
        if seen is not None:
            seen.append(result.detach().clone())
        return result.float().square().mean()

    return closure


def copies(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(a, b) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def moved(model: nn.Module, counter: int, to: float) -> nn.Module:
    """A copy whose weights are where an evaluation should see them."""
    other = copy.deepcopy(model)
    trained = [(i, p) for i, p in enumerate(other.parameters()) if p.requires_grad]
    plan = Plan([p for _, p in trained], parameters=[i for i, _ in trained])
    perturb_(plan, PhiloxState(SEED, counter), to, backend="reference")
    return other


def check(model: nn.Module, run=apply, steps: int = 2, **options) -> AdaMeZO:
    """Every evaluation is bitwise that of a model whose weights were moved. The first step is
    watched, the second is not; at lr = 0 both begin at the same weights."""
    before, places = copies(model), [p.data_ptr() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    seen: list[torch.Tensor] = []
    optimizer = make(model, lr=0.0, **options)
    for _ in range(steps):
        optimizer.step(loss_of(model, run, seen))
    assert same_bits(copies(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert not any(p.grad_fn for p in model.parameters())
    # One write a step and parameter, by the update.
    trained = [p.requires_grad for p in model.parameters()]
    assert [p._version for p in model.parameters()] <= [
        version + steps * train for version, train in zip(versions, trained, strict=True)
    ]
    with torch.no_grad():
        plain = run(model)
        expected = [
            run(moved(model, step, to)) for step in range(steps) for to in (ZO_EPS, -ZO_EPS)
        ]
    assert len(seen) == 2 * steps
    for found, wanted in zip(seen, expected, strict=True):
        assert torch.equal(found, wanted)
        assert not torch.equal(found, plain)
    return optimizer


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_evaluations_are_those_of_moved_weights(name, dtype):
    model, run = built(name)
    check(model.to(dtype), run)


@pytest.mark.parametrize("name", MORE_MODELS)
def test_other_ways_to_read_a_weight(name):
    check(*built(name), steps=3)


def test_one_direction_for_tied_weights():
    """Were the tied weight perturbed again inside the module that perturbed it, or along a second
    direction, the loss would be another."""
    model, run = built("shared module")
    optimizer = check(model, run)
    assert len(list(model.parameters())) == 3
    assert optimizer.param_groups[0]["next_direction"] == 2


def test_two_parameters_over_one_memory():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    seen: list[torch.Tensor] = []
    optimizer = make(model, lr=0.0)
    optimizer.step(loss_of(model, seen=seen))
    tied = copy.deepcopy(model)
    tied[1].weight = tied[0].weight
    plan = Plan([tied[0].weight, tied[0].bias, tied[1].bias], parameters=[0, 1, 3])
    perturb_(plan, PhiloxState(SEED, 0), ZO_EPS, backend="reference")
    with torch.no_grad():
        assert torch.equal(seen[0], apply(tied))
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()


# --- around the closure -------------------------------------------------------------------------


def test_dropout_is_the_same_in_both_evaluations():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    seen: list[torch.Tensor] = []
    torch.manual_seed(3)
    make(model, lr=0.0).step(loss_of(model, seen=seen))
    after = torch.rand(4)
    for found, to in zip(seen, (ZO_EPS, -ZO_EPS), strict=True):
        torch.manual_seed(3)
        with torch.no_grad():
            assert torch.equal(found, apply(moved(model, 0, to)))
    assert torch.equal(after, torch.rand(4))  # where one evaluation leaves the generator


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(where):
    """The casts that autocast keeps are of the weights of one evaluation."""
    model, _ = built("shared module")

    def run(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs(model))

    if where == "inside":
        check(model, run)
        return
    seen: list[torch.Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        apply(model)  # casts of the weights as they are
        optimizer = make(model, lr=0.0)
        for _ in range(2):
            optimizer.step(loss_of(model, seen=seen))
        after = apply(model)
    with torch.no_grad():
        for i, found in enumerate(seen):
            assert torch.equal(found, run(moved(model, i // 2, (ZO_EPS, -ZO_EPS)[i % 2])))
        assert torch.equal(after, run(model))


def test_parametrizations_that_are_cached():
    model = parametrized(Symmetric())
    seen: list[torch.Tensor] = []
    with parametrize.cached():
        apply(model)
        make(model, lr=0.0).step(loss_of(model, seen=seen))
        after = apply(model)
    with torch.no_grad():
        for found, to in zip(seen, (ZO_EPS, -ZO_EPS), strict=True):
            assert torch.equal(found, apply(moved(model, 0, to)))
        assert torch.equal(after, apply(model))


def test_inference_mode_in_the_closure():
    def run(model: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(inputs(model)).clone()

    model, _ = built("shared module")
    check(model, run, steps=3)
    apply(model).sum().backward()  # the parameters are what they were, for autograd too
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_in_the_closure_do_not_disturb():
    def run(model: nn.Module) -> torch.Tensor:
        with torch.enable_grad():
            return model(inputs(model)).detach()

    check(built("shared module")[0], run)


def test_generation_with_a_cache():
    def run(model: nn.Module) -> torch.Tensor:
        first = model(input_ids=TOKENS, use_cache=True)
        second = model(input_ids=TOKENS[:, :1], past_key_values=first.past_key_values)
        return torch.cat([first.logits, second.logits], dim=1)

    check(llama(), run)
    check(
        llama(),
        lambda model: model.generate(
            TOKENS,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        ).logits[-1],
    )


@pytest.mark.parametrize("how", ["method", "function", "part"])
def test_compiled_models_run_uncompiled(how):
    """Compiled code does not run hooks that were not there when it was made."""
    model, _ = built("shared module")
    compiled: list = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    if how == "method":
        model.compile(backend=backend)
        called = model
    elif how == "function":
        called = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
        called = nn.Sequential(model)
    with torch.no_grad():
        apply(called)  # compiled before the first step
    assert compiled
    seen: list[torch.Tensor] = []
    optimizer = make(model, lr=0.0)
    for _ in range(2):
        optimizer.step(lambda: loss_of(called, seen=seen)())
    plain = Shared()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for i, found in enumerate(seen):
            assert torch.equal(found, apply(moved(plain, i // 2, (ZO_EPS, -ZO_EPS)[i % 2])))
    torch.compiler.reset()


def test_scripted_modules():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model = nn.Sequential(scripted, nn.Linear(8, 8))
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        p.data.copy_(q)
    seen: list[torch.Tensor] = []
    optimizer = make(model, lr=0.0)
    for _ in range(2):
        optimizer.step(loss_of(model, seen=seen))
    with torch.no_grad():
        for i, found in enumerate(seen):
            assert torch.equal(found, apply(moved(plain, i // 2, (ZO_EPS, -ZO_EPS)[i % 2])))


def test_functional_call_with_the_parameters():
    def run(model: nn.Module) -> torch.Tensor:
        return torch.func.functional_call(model, dict(model.named_parameters()), inputs(model))

    check(built("shared module")[0], run)


def test_other_models_are_left_alone():
    model, other = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        expected = apply(other)
    seen = []

    def run(model: nn.Module) -> torch.Tensor:
        seen.append(apply(other))
        return model(seen[-1])

    check(model, run)
    assert all(torch.equal(x, expected) for x in seen)


def test_a_step_inside_a_step():
    """As when a closure trains a helper: hooks of the one leave the other's weights alone."""
    model, helper = nn.Linear(8, 8), nn.Linear(8, 8)
    inner = make(helper, lr=0.0)
    before = copies(helper)

    def run(model: nn.Module) -> torch.Tensor:
        inner.step(loss_of(helper))
        return apply(model)

    check(model, run)
    assert same_bits(copies(helper), before)


def test_nothing_is_left_behind():
    from torch.nn.modules import module as torch_module

    model, run = built("Llama")
    optimizer = make(model, lr=0.0)
    optimizer.step(loss_of(model, run))
    assert not torch_module._global_forward_pre_hooks
    assert not torch_module._global_forward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(run(model), run(copy.deepcopy(model)))


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_step_updates_weights_that_were_never_moved(dtype, backend):
    fused = backend == "native"
    model, run = built("Llama")
    model.to(dtype)
    expected = copy.deepcopy(model)
    optimizer = make(model, lr=0.05, betas=(0.0, 0.0), fused=fused, rounding="stochastic")
    directions = []
    for step in range(3):
        optimizer.step(loss_of(model, run))
        directions.append(optimizer.projected_grad)
        update_(
            Plan(list(expected.parameters())),
            [PhiloxState(SEED, step)],
            [optimizer.projected_grad],
            None,
            lr=0.05,
            rounding="stochastic",
            backend="reference",
        )
    assert same_bits(model.parameters(), expected.parameters())
    assert len(set(directions)) == 3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_drift(dtype):
    """At lr = 0 nothing moves, as docs/perturbation.md says."""
    model, run = built("Llama")
    model.to(dtype)
    before = copies(model)
    optimizer = make(model, lr=0.0, horizon=2)
    for _ in range(60):
        optimizer.step(loss_of(model, run))
    assert same_bits(copies(model), before)
    assert optimizer.param_groups[0]["steps"] == 60


def test_in_place_does_drift():
    """The bound of the test above is not met by everything."""
    model, run = built("Llama")
    model.bfloat16()
    before = copies(model)
    optimizer = make(model, lr=0.0, perturbation="inplace", horizon=2)
    for _ in range(5):
        optimizer.step(loss_of(model, run))
    assert not same_bits(copies(model), before)


def test_groups_and_frozen_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    groups = [
        {"params": [model[0].weight, model[1].weight], "weight_decay": 0.1},
        {"params": [model[0].bias, model[1].bias], "lr": 0.0},
    ]
    before = copies(model)
    optimizer = AdaMeZO(
        groups, lr=0.1, model=model, perturbation="out_of_place", seed=SEED, zo_eps=ZO_EPS
    )
    optimizer.step(loss_of(model))
    after = copies(model)
    assert same_bits(after[1::2], before[1::2])
    assert not any(torch.equal(p, q) for p, q in zip(after[::2], before[::2], strict=True))
    model[0].requires_grad_(False)
    optimizer.step(loss_of(model))
    assert same_bits(list(model.parameters())[:2], after[:2])
    assert not torch.equal(model[1].weight, after[2])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_steps_are_replayed_without_the_model(dtype):
    """Weights that were never moved are not moved in a replay either."""
    model, run = built("Llama")
    model.to(dtype)
    twin = copy.deepcopy(model)
    optimizer, other = (make(m, lr=0.05, nonfinite="skip") for m in (model, twin))
    records = []
    optimizer.recorder = records.append
    for step in range(4):
        poison = float("nan") if step == 2 else 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step(lambda poison=poison: run(model).float().square().mean() * poison)
    assert [r.outcome for r in records] == ["updated", "updated", "skipped", "updated"]
    assert [r.perturbations for r in records] == [0] * 4
    for record in records:
        other.replay(record)
    assert same_bits(model.parameters(), twin.parameters())


def test_fused_adamezo_step_knows_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    options = {"perturbation": "out_of_place", "lr": 0.0, "seed": SEED, "zo_eps": ZO_EPS}
    before = copies(model)
    seen: list[torch.Tensor] = []
    for _ in range(2):
        fused_adamezo_step(model, loss_of(model, seen=seen), **options)
    assert same_bits(copies(model), before)
    with torch.no_grad():
        assert torch.equal(seen[3], apply(moved(model, 1, -ZO_EPS)))
    watch, optimizer = weakref.ref(model), weakref.ref(optimizer_of(model))
    del model
    gc.collect()
    assert watch() is None
    assert optimizer() is None


# --- memory -------------------------------------------------------------------------------------


def aligned(bytes_: int) -> int:
    return -(-bytes_ // 64) * 64


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scratch_is_the_largest_module(dtype):
    model, run = built("Llama")
    model.to(dtype)
    optimizer = make(model, lr=0.0)
    assert optimizer.scratch_bytes == 0
    for _ in range(3):
        optimizer.step(loss_of(model, run))
        own = [sum(aligned(p.nbytes) for p in m.parameters(recurse=False)) for m in model.modules()]
        assert optimizer.scratch_bytes == max(own)
    assert max(own) < sum(p.nbytes for p in model.parameters()) / 2


def test_scratch_of_modules_inside_each_other():
    model, run = built("nested calls")
    optimizer = check(model, run, steps=3)
    own = [sum(aligned(p.nbytes) for p in m.parameters(recurse=False)) for m in model.modules()]
    assert optimizer.scratch_bytes == sum(own)


def test_scratch_is_all_that_is_allocated():
    """What the process has allocated for weights while a module runs, beside the model's own."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)), nn.Linear(64, 192))
    optimizer = make(model, lr=0.0)
    pieces: set[tuple[int, int]] = set()

    def closure() -> float:
        x = torch.ones(1, 64)
        for module in model:
            handle = module.register_forward_pre_hook(
                lambda module, *_: pieces.update(
                    (p.data_ptr(), p.data_ptr() + p.nbytes) for p in module.parameters()
                )
            )
            x = module(x)[:, :64]
            handle.remove()
        return float(x.sum())

    optimizer.step(closure)
    pieces.clear()
    optimizer.step(closure)  # its memory is one piece
    begin, end = min(a for a, _ in pieces), max(b for _, b in pieces)
    largest = 64 * 192 * 4 + 192 * 4
    assert end - begin == largest == optimizer.scratch_bytes
    assert all(a % 64 == 0 for a, _ in pieces)
    weights = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in model.parameters()]
    assert not any(a < end and begin < b for a, b in weights)


def test_copies_that_are_let_out_are_not_overwritten():
    """Bytes that a view still shows are nobody else's, and the rest of the scratch stays small."""
    model, run = built("view of a weight let out")
    kept: list[torch.Tensor] = []
    model.table.register_forward_hook(lambda module, arguments, rows: kept.append(rows))
    optimizer = make(model, lr=0.0)
    for _ in range(3):
        optimizer.step(loss_of(model, run))
    for i, rows in enumerate(kept):
        table = moved(model, i // 2, (ZO_EPS, -ZO_EPS)[i % 2]).table
        assert torch.equal(rows, table.weight[:7])
    assert optimizer.scratch_bytes <= 2 * aligned(80 * 4) + aligned(320)


# --- failures -----------------------------------------------------------------------------------


class Fails(nn.Module):
    """Raises in its ``at``-th forward, while it and the module around it are perturbed."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0, 1, 8))
        self.inner = nn.Linear(8, 8)
        self.error, self.at, self.calls = error, at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.inner(x) * self.weight
        if self.calls == self.at:
            view = self.weight[:2]
            raise self.error(f"of {view.sum():.3f}")
        return x


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_forward_that_raises(error, at, dtype):
    model = nn.Sequential(nn.Linear(8, 8), Fails(error, at)).to(dtype)
    before, places = copies(model), [p.data_ptr() for p in model.parameters()]
    optimizer = make(model, lr=0.0)
    records = []
    optimizer.recorder = records.append
    for step in range(2):
        if step == (at - 1) // 2:
            with pytest.raises(error, match="of "):
                optimizer.step(loss_of(model))
        else:
            optimizer.step(loss_of(model))
        assert same_bits(copies(model), before)
        assert [p.data_ptr() for p in model.parameters()] == places
    assert [record.outcome for record in records] == ["updated"]  # a failure has touched nothing
    check(model)


def test_an_exception_that_the_closure_catches():
    """What the failed module had perturbed is back before the closure goes on."""
    model = nn.Sequential(nn.Linear(8, 8), Fails(LookupError, 10**9))

    def run(model: nn.Module) -> torch.Tensor:
        before = [p.data_ptr() for p in model.parameters()]
        model[1].at = model[1].calls + 1
        with pytest.raises(LookupError):
            model(inputs(model))
        assert [p.data_ptr() for p in model.parameters()] == before
        return model(inputs(model))

    check(model, run, steps=3)


def test_a_loss_that_is_not_finite():
    model = nn.Linear(8, 8)
    before = copies(model)
    optimizer = make(model, lr=0.1, nonfinite="raise")
    with pytest.raises(FloatingPointError):
        optimizer.step(lambda: apply(model).sum() * float("nan"))
    assert same_bits(copies(model), before)


# --- refusals -----------------------------------------------------------------------------------


def refused(model: nn.Module, run, match: str, error: type[Exception] = RuntimeError) -> None:
    before, places = copies(model), [p.data_ptr() for p in model.parameters()]
    optimizer = make(model)
    with pytest.raises(error, match=match):
        optimizer.step(loss_of(model, run))
    assert same_bits(copies(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert optimizer.param_groups[0]["steps"] == 0


def test_without_a_model():
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"needs the model.*AdaMeZO\.for_model\(model, \.\.\.\)"):
        AdaMeZO(model.parameters(), perturbation="out_of_place")
    with pytest.raises(ValueError, match="Invalid perturbation: 'precise'"):
        AdaMeZO.for_model(model, perturbation="precise")
    optimizer = make(model)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="needs the model"):
        optimizer.step(lambda: 0.0)


def test_parameters_that_are_not_the_models():
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    with pytest.raises(ValueError, match="the model has no odd"):
        AdaMeZO(
            [*model.named_parameters(), ("odd", other.weight)],
            model=model,
            perturbation="out_of_place",
        )
    optimizer = make(model)
    optimizer.step(loss_of(model))
    optimizer.add_param_group({"params": [("later", other.weight)]})
    with pytest.raises(ValueError, match="the model has no later"):
        optimizer.step(loss_of(model))


def test_perturbation_is_shared_by_all_groups():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = AdaMeZO(model[0].parameters(), model=model, perturbation="out_of_place")
    with pytest.raises(ValueError, match="perturbation is 'out_of_place' for the whole step"):
        optimizer.add_param_group({"params": model[1].parameters(), "perturbation": "inplace"})
    optimizer.add_param_group({"params": model[1].parameters()})
    assert optimizer.param_groups[1]["perturbation"] == "out_of_place"


def test_a_weight_that_the_closure_reads():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    refused(
        model,
        lambda model: apply(model) + model[1].weight.square().sum(),
        r"1\.weight is read outside of all modules.*perturbation='inplace'",
    )
    refused(model, lambda model: inputs(model) @ model[0].weight.t(), r"0\.weight is read outside")


def test_a_weight_that_a_module_of_another_model_reads():
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.weight = model.weight
    refused(model, lambda model: other(inputs(model)), "weight is read in the forward of a Linear")


def test_a_weight_read_through_another_tensor():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    alias = {name: p.detach() for name, p in model.named_parameters()}
    refused(
        model,
        lambda model: torch.func.functional_call(model, alias, inputs(model)),
        r"0\.weight is read through another tensor",
    )
    model[1].register_buffer("top", model[1].weight.data[:4])
    model[1].register_forward_hook(
        lambda module, arguments, result: result[..., :4] * module.top[:, :4].sum()
    )
    refused(model, apply, r"1\.weight is read through another tensor")


def test_a_weight_that_a_forward_writes():
    model = nn.Embedding(40, 8, max_norm=0.5)
    refused(
        model,
        lambda model: model(TOKENS),
        "weight is written in a forward, by aten.embedding_renorm",
    )


def test_another_thread():
    model = nn.Linear(8, 8)

    def run(model: nn.Module) -> torch.Tensor:
        results: list = []

        def work() -> None:
            try:
                results.append(model(inputs(model)))
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    refused(model, run, "weight is read in a thread other than the step's")


# --- changes on the way -------------------------------------------------------------------------


def test_training_mode_is_looked_at_again():
    """In evaluation mode the layer reads its children's weights, in training it calls them."""
    model = encoder()
    seen: list[torch.Tensor] = []
    optimizer = make(model, lr=0.0)
    for step in range(4):
        model.train(step % 2 == 0)
        optimizer.step(loss_of(model, seen=seen))
    for i, found in enumerate(seen):
        model.train(i // 2 % 2 == 0)
        with torch.no_grad():
            assert torch.equal(found, apply(moved(model, i // 2, (ZO_EPS, -ZO_EPS)[i % 2])))


def test_modules_and_weights_are_replaced():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = make(model, lr=0.0)
    optimizer.step(loss_of(model))
    model[0] = nn.Sequential(model[0], nn.Tanh())  # the same parameters in other modules
    model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()})
    model.bfloat16()
    before = copies(model)
    seen: list[torch.Tensor] = []
    optimizer.step(loss_of(model, seen=seen))
    assert same_bits(copies(model), before)
    with torch.no_grad():
        assert torch.equal(seen[0], apply(moved(model, 1, ZO_EPS)))


class Switches(nn.Module):
    """Reads a weight without calling its module, from a certain call on."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls <= 4:
            return self.child(x)
        return nn.functional.linear(x, self.child.weight, self.child.bias)


def test_reads_that_begin_later_are_found(monkeypatch):
    monkeypatch.setattr(readers, "WATCHED_EVERY", 3)
    model = Switches()
    optimizer = make(model, lr=0.0)
    seen: list[torch.Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step(loss_of(model, seen=seen))
    with pytest.warns(RuntimeWarning, match=r"child\.(weight|bias) is read in the forward of a Sw"):
        optimizer.step(loss_of(model, seen=seen))
    optimizer.step(loss_of(model, seen=seen))
    with torch.no_grad():
        for i in (0, 1, 2, 3, 6, 7, 8, 9):
            expected = moved(model, i // 2, (ZO_EPS, -ZO_EPS)[i % 2]).child(inputs(model))
            assert torch.equal(seen[i], expected)


class KeepsItsTranspose(nn.Linear):
    kept = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = self.weight.t()
        return x @ self.kept + self.bias


def test_a_view_that_is_kept_from_an_evaluation_to_the_next_is_refused():
    """It would be of the first perturbed copy, for ever: the losses would not differ."""
    model = nn.Sequential(nn.Linear(8, 8), KeepsItsTranspose(8, 8))
    optimizer, before = make(model, lr=0.1), copies(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"shares memory with 1\.weight, 1\.bias as an ear"):
            optimizer.step(loss_of(model))
    assert same_bits(copies(model), before)


class ReturnsAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self) -> torch.Tensor:
        return self.weight.t()


def test_a_view_that_is_returned_may_be_used_in_its_evaluation():
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "view": ReturnsAView()})
    kept = []

    def run(model: nn.Module) -> torch.Tensor:
        kept.append(model["view"]())  # kept, but not read again
        return model["linear"](inputs(model["linear"])) @ kept[-1]

    check(model, run, steps=3)


# --- ways past the watch ------------------------------------------------------------------------

PENALTY = r"0\.weight is read outside of all modules"


def penalized(model: nn.Module) -> torch.Tensor:
    return apply(model) + model[0].weight.square().sum()


def test_a_refused_optimizer_stays_refused_until_the_cause_is_gone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer, before = make(model, lr=0.1), copies(model)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=PENALTY):
            optimizer.step(loss_of(model, penalized))
    assert same_bits(copies(model), before)
    optimizer.step(loss_of(model))
    assert not same_bits(copies(model), before)


@pytest.mark.parametrize("error", [ValueError, MemoryError, torch.OutOfMemoryError])
def test_a_watched_step_that_fails_before_the_read(error):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = make(model)

    def fails() -> torch.Tensor:
        apply(model)
        raise error("before the penalty")

    for _ in range(2):
        with pytest.raises(error, match="before the penalty"):
            optimizer.step(fails)
        with pytest.raises(RuntimeError, match=PENALTY):
            optimizer.step(loss_of(model, penalized))


def test_a_watched_step_that_is_skipped():
    """A loss that is not finite may have kept the rest of the closure from running."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.append(Switches())
    model[2].calls = 2  # the two of the first step are the last that call the child
    optimizer = make(model, lr=0.0)
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step(lambda: apply(model).mean() * float("nan"))
    seen: list[torch.Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no update has been made with a wrong loss
        optimizer.step(loss_of(model, seen=seen))
    with torch.no_grad():
        for i, to in enumerate((ZO_EPS, -ZO_EPS)):
            assert torch.equal(seen[i], apply(moved(model, 1, to)))


@pytest.mark.parametrize("how", ["replayed", "loaded"])
def test_the_first_step_was_taken_elsewhere(how):
    def fresh() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    model = fresh()
    optimizer, records = make(model), []
    optimizer.recorder = records.append
    optimizer.step(loss_of(model))
    second = fresh()
    other = make(second)
    if how == "replayed":
        other.replay(records[0])
    else:
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=PENALTY):
        other.step(loss_of(second, penalized))


def test_a_penalty_that_begins_at_a_later_step():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer, alias = make(model), model[1].bias.detach()
    for _ in range(4):
        optimizer.step(loss_of(model))
    before = copies(model)
    with pytest.raises(RuntimeError, match=PENALTY):
        optimizer.step(loss_of(model, penalized))
    assert same_bits(copies(model), before)
    with pytest.raises(RuntimeError, match=r"1\.bias is read through another tensor"):
        optimizer.step(lambda: apply(model).mean() + alias.sum())
    optimizer.step(loss_of(model))


def test_a_module_that_first_runs_at_a_later_step():
    """It reads weights that are not its own, as nn.MultiheadAttention does."""
    model = nn.Sequential(nn.Linear(8, 8), Switches())
    model[1].calls = 100
    seen: list[torch.Tensor] = []
    optimizer = make(model, lr=0.0)
    for _ in range(3):
        optimizer.step(lambda: model[0](inputs(model)).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.step(loss_of(model, seen=seen))
    with torch.no_grad():
        for i in range(4):
            expected = apply(moved(model, 3 + i // 2, (ZO_EPS, -ZO_EPS)[i % 2]))
            assert torch.equal(seen[i], expected)


def test_a_module_of_no_model_that_first_runs_at_a_later_step():
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer = make(model)
    for _ in range(3):
        optimizer.step(lambda: model(inputs(model)).mean() + other(inputs(model)).mean())
    third = nn.Linear(8, 8)
    third.weight = model.weight
    with pytest.raises(RuntimeError, match="weight is read in the forward of a Linear, which is"):
        optimizer.step(lambda: model(inputs(model)).mean() + third(inputs(model)).mean())


def test_a_refusal_that_the_closure_catches():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer, before = make(model), copies(model)

    def closure() -> torch.Tensor:
        loss = apply(model).mean()
        try:
            return loss + model[0].weight.square().sum()
        except RuntimeError:
            return loss

    with pytest.raises(RuntimeError, match=PENALTY):
        optimizer.step(closure)
    assert same_bits(copies(model), before)


def test_modes_of_the_closure_are_left_as_they_are():
    """The watch is a mode of torch's dispatcher, and leaves others where they lie on its stack."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer, counted = make(model), []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func)
            return func(*args, **(kwargs or {}))

    def closure() -> torch.Tensor:
        with Counts():
            loss = apply(model).mean()
        return loss + model[1](inputs(model)).mean()

    counts = []
    for _ in range(3):
        counted.clear()
        optimizer.step(closure)
        counts.append(len(counted))
        assert _get_current_dispatch_mode() is None
    assert counts[0] > 0
    assert counts[1] == counts[2] > 0  # the first also makes the copies


def test_saving_and_loading():
    model, run = built("Llama")
    twin = copy.deepcopy(model)
    optimizer, again = make(model, lr=0.01), make(twin, lr=0.01)
    for _ in range(3):
        optimizer.step(loss_of(model, run))
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["perturbation"] == "out_of_place"
    for _ in range(2):
        for o, m in ((optimizer, model), (again, twin)):
            o.step(loss_of(m, run))
    assert same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_need_their_model_again(how):
    model = nn.Linear(8, 8)
    optimizer = make(model, lr=0.01)
    optimizer.step(loss_of(model))
    other, again = how((model, optimizer))
    assert again.model is None
    with pytest.raises(ValueError, match=r"optimizer\.model = model"):
        again.step(loss_of(other))
    again.model = other
    for o, m in ((optimizer, model), (again, other)):
        o.step(loss_of(m))
    assert same_bits(model.parameters(), other.parameters())


def test_in_place_ignores_the_model():
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.load_state_dict(a.state_dict())
    first = make(a, lr=0.1, perturbation="inplace")
    second = AdaMeZO(b.parameters(), lr=0.1, seed=SEED, zo_eps=ZO_EPS)
    for o, m in ((first, a), (second, b)):
        o.step(loss_of(m))
    assert same_bits(a.parameters(), b.parameters())
    assert first.scratch_bytes == 0
