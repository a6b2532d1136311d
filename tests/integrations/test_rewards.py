"""Rewards of generated text as the objective, on tiny models and on an engine like vLLM's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from adamezo import FZOO, AdaMeZO, MeZO
from adamezo.integrations.vllm import RewardSteps, WorkerExtension
from adamezo.rewards import TextReward, ranks, z_scores
from adamezo.runlog import StepLog, optimizer_for, read, replay
from helpers import families
from helpers.trainers import same, weights

transformers = pytest.importorskip("transformers")

PROMPTS = ["w5 w6", "w7 w8 w9", "w10", "w11 w12 w13"]


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<unk>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, families.VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>"
    )


def low(prompts, completions, **columns):
    """The share of low-numbered words, which moves in small steps."""
    return [
        sum(int(word[1:]) < 20 for word in text.split()) / max(len(text.split()), 1)
        for text in completions
    ]


def objective(model, reward=low, **options):
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [0, 1], **options}
    return TextReward(model, tokenizer(), reward, **settings)


# --- shaping


def test_z_scores_and_ranks():
    values = [3.0, 1.0, 1.0, 7.0]
    z = torch.tensor(values, dtype=torch.float64)
    expected = (z - z.mean()) / z.std(correction=0)
    assert z_scores(values) == pytest.approx(expected.tolist(), rel=1e-12)
    assert ranks(values) == pytest.approx([2 / 3 - 0.5, 0.5 / 3 - 0.5, 0.5 / 3 - 0.5, 0.5])
    assert z_scores([2.0, 2.0]) == ranks([2.0, 2.0]) == [0.0, 0.0]
    assert ranks([4.0]) == [0.0]
    assert sum(ranks([5.0, 2.0, 9.0, 2.0, 2.0])) == pytest.approx(0, abs=1e-15)
    with pytest.raises(TypeError, match="capturable"):
        ranks([torch.tensor(1.0)])


@pytest.mark.parametrize("shaping", [z_scores, ranks])
def test_an_update_is_computed_from_the_shaped_losses(shaping):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MeZO([p], queries=2, zo_eps=0.25, seed=1)
    optimizer.shaping = shaping
    losses = [1.0, 4.0, 2.0, 8.0]
    given = iter(losses)
    assert optimizer.step(lambda: next(given)).item() == 3.75
    shaped = shaping(losses)
    assert optimizer.losses == tuple(losses)
    assert optimizer.measured == pytest.approx(
        [(shaped[0] - shaped[1]) / 0.5, (shaped[2] - shaped[3]) / 0.5], rel=1e-12
    )


@pytest.mark.filterwarnings("ignore:the losses of a step were")
def test_shaping_does_not_hide_a_reward_that_is_not_finite():
    p = torch.nn.Parameter(torch.ones(3))
    for shaping in (z_scores, ranks):
        for bad in (float("nan"), float("inf")):
            optimizer = MeZO([p], seed=1)
            optimizer.shaping = shaping
            given = iter([1.0, bad])
            optimizer.step(lambda given=given: next(given))
            assert optimizer.skipped == 1
    assert torch.equal(p.detach(), torch.ones(3))


def test_a_log_replays_shaped_steps_without_the_shaping(tmp_path):
    model = families.make("llama")
    optimizer = MeZO.for_model(model, lr=1e-2, queries=2, seed=1, maximize=True)
    score = objective(model, shaping="rank")
    with StepLog.create(tmp_path / "steps.log", optimizer):
        for _ in range(3):
            score.step(optimizer, PROMPTS)
    log, base = read(tmp_path / "steps.log"), families.make("llama")
    replay(log, optimizer_for(log.header, dict(base.named_parameters())))
    assert same(weights(base), weights(model))


# --- rewards of text


def test_the_reward_grows():
    model = families.make("llama")
    optimizer = MeZO.for_model(model, lr=4e-4, queries=4, zo_eps=2e-2, seed=1, maximize=True)
    score = objective(model)
    before = score.evaluate(PROMPTS)
    for _ in range(25):
        score.step(optimizer, PROMPTS)
    after = score.evaluate(PROMPTS)
    assert len(score.completions) == 4
    assert before < 0.6
    assert after > before + 0.25


@pytest.mark.slow
def test_the_example_learns_to_count():
    from examples import count

    made = count.run(0, 20, lr=1e-4, zo_eps=1e-2, queries=8)
    (_, before), (_, after) = made["right"]
    assert len(made["rewards"]) == 20
    assert after > before + 0.1


def test_what_the_reward_function_is_given():
    seen = []

    def reward(prompts, completions, answers):
        seen.append((prompts, answers))
        return [float(len(c)) for c in completions]

    model = families.make("llama").train()
    score = objective(model, reward, batch_size=3)
    optimizer = AdaMeZO.for_model(model, seed=1, maximize=True)
    score.step(optimizer, PROMPTS, answers=[1, 2, 3, 4])
    assert seen == [(PROMPTS, [1, 2, 3, 4])] * 2
    assert model.training
    assert optimizer.shaping is None
    whole = objective(model.eval(), reward)
    a = (whole.evaluate(PROMPTS, answers=None), whole.completions)
    assert (score.evaluate(PROMPTS, answers=None), score.completions) == a  # in pieces or at once


def test_samples_are_drawn_with_the_same_numbers_within_a_step():
    texts = []

    def reward(prompts, completions):
        texts.append(completions)
        return [0.0] * len(completions)

    model = families.make("llama")
    # So little that no float32 weight moves: evaluations differ by their random numbers or not.
    optimizer = MeZO.for_model(model, zo_eps=1e-20, queries=2, seed=1, maximize=True)
    score = objective(model, reward, do_sample=True)
    for _ in range(2):
        score.step(optimizer, PROMPTS)
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert texts[4] == texts[7] != texts[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: objective(m).step(MeZO.for_model(m), PROMPTS), "make it with maximize=True"),
        (lambda m: objective(m, shaping="best"), "Invalid shaping: 'best'"),
        (lambda m: objective(m, batch_size=0), "Invalid batch_size: 0"),
        (lambda m: objective(m, lambda **_: [1.0]).evaluate(PROMPTS), "returned 1 numbers for 4"),
        (lambda m: objective(m).evaluate([""]), "prompts of at least one token"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(families.make("llama"))


# --- an engine like vLLM's


class Worker:
    """As vLLM's, which mixes ``worker_extension_cls`` into its own class."""

    def __init__(self, model) -> None:
        self.model_runner = SimpleNamespace(model=model)


class Extended(WorkerExtension, Worker):
    pass


class Engine:
    """Answers ``collective_rpc`` as ``vllm.LLM`` does, and notes what is asked."""

    def __init__(self, model, workers: int = 1) -> None:
        self.model = model
        self.calls = []
        self.resets = True
        self._workers = [Extended(model) for _ in range(workers)]

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        self.calls.append(method)
        return [getattr(worker, method)(*args, **(kwargs or {})) for worker in self._workers]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return self.resets

    @torch.no_grad()
    def loss(self) -> float:
        ids = families.tokens()
        return -self.model(input_ids=ids, labels=ids).loss.item()


OPTIONS = dict(lr=1e-2, seed=3, maximize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "more"), [
    (AdaMeZO, {}), (MeZO, {"queries": 2}), (FZOO, {"queries": 3}),
])  # fmt: skip
def test_steps_have_the_bits_of_steps_out_of_place(method, more, dtype):
    engine = Engine(families.make("llama").to(dtype))
    steps = RewardSteps(engine, method.__name__, **OPTIONS, **more)
    means = [steps.step(engine.loss) for _ in range(4)]
    local = Engine(families.make("llama").to(dtype))
    optimizer = method.for_model(local.model, perturbation="out_of_place", **OPTIONS, **more)
    expected = [optimizer.step(local.loss).item() for _ in range(4)]
    assert means == expected
    assert same(weights(engine.model), weights(local.model))
    assert not same(weights(engine.model), weights(families.make("llama").to(dtype)))


def test_the_protocol():
    engine = Engine(families.make("llama"))
    steps = RewardSteps(engine, "AdaMeZO", **OPTIONS)
    assert steps.names == [name for name, _ in engine.model.named_parameters()]
    engine.calls.clear()
    steps.step(lambda: [1.0, 2.0])
    assert engine.calls == [
        "adamezo_probes",
        *["adamezo_perturb", "reset_prefix_cache"] * 2,
        "adamezo_restore", "reset_prefix_cache", "adamezo_update",
    ]  # fmt: skip


def test_weights_are_restored_bit_for_bit_whatever_a_reward_does():
    model = families.make("llama").bfloat16()
    engine, before = Engine(model), weights(model)
    steps = RewardSteps(engine, "MeZO", **(OPTIONS | {"lr": 0.0}))
    for _ in range(20):
        steps.step(engine.loss)
    assert same(weights(model), before)
    with pytest.raises(ZeroDivisionError):
        steps.step(lambda: 1 / 0)
    assert same(weights(model), before)
    engine.resets = False
    with pytest.raises(RuntimeError, match="did not reset its cache of prefixes"):
        steps.step(engine.loss)
    assert same(weights(model), before)


def test_engines_that_are_refused():
    with pytest.raises(ValueError, match="got 2 workers, expected 1"):
        RewardSteps(Engine(families.make("llama"), workers=2), "MeZO", **OPTIONS)
    with pytest.raises(ValueError, match="expected seed="):
        RewardSteps(Engine(families.make("llama")), "MeZO", maximize=True)
    with pytest.raises(ValueError, match="the method is 'Adam'"):
        RewardSteps(Engine(families.make("llama")), "Adam", **OPTIONS)
