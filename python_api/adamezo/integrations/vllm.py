"""vLLM: rewards from its engine, steps on the weights inside its workers.

A reward needs completions from perturbed weights, and these are in the workers. A class of vLLM's
``worker_extension_cls`` holds the optimizer there; the process that owns the engine tells it where
to evaluate, generates, and hands the rewards back::

    llm = vllm.LLM(path, worker_extension_cls="adamezo.integrations.vllm.WorkerExtension")
    steps = RewardSteps(llm, "MeZO", lr=1e-4, queries=4, seed=0, maximize=True)
    mean = steps.step(lambda: rewards_of(llm.generate(prompts, sampling)))

The weights stay exact. They are perturbed from a copy, which is put back bit for bit before the
update, so that nothing drifts in 16 bits; the update is that of ``perturbation="out_of_place"``.
The copy is in the host's memory and as large as the weights.

The protocol is tested against an engine of ours with vLLM's ``collective_rpc``. It has not been run
with vLLM itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..engine.optimizer import ZerothOrder
from ..engine.perturb import InPlace


class WorkerExtension:
    """Is mixed into vLLM's worker, whose model is ``self.model_runner.model``."""

    model_runner: Any

    def adamezo_begin(self, method: str, options: dict[str, Any]) -> list[str]:
        """Makes the optimizer, and the copy of the weights. Returns the weights' names."""
        if method not in methods.__all__:
            raise ValueError(f"the method is {method!r}, expected one of {methods.__all__}")
        model: nn.Module = self.model_runner.model
        for p in model.parameters():
            p.requires_grad_(p.dtype in (torch.float32, torch.bfloat16, torch.float16))
        made: ZerothOrder = getattr(methods, method).for_model(
            model, **{**options, "perturbation": "out_of_place"}
        )
        self._adamezo = made
        self._adamezo_copies = {
            name: p.detach().to("cpu", copy=True)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        return list(self._adamezo_copies)

    def adamezo_probes(self) -> int:
        """At how many places the next step evaluates."""
        return len(self._adamezo._next_probes()[2])

    @torch.no_grad()
    def adamezo_perturb(self, index: int) -> None:
        """Sets the weights to those of an evaluation of the next step."""
        self.adamezo_restore()
        optimizer = self._adamezo
        options, first, probes = optimizer._next_probes()
        step = optimizer._begin(options, first, probes)
        direction, scale = optimizer._points(probes, options)[index]
        # As the copies of out_of_place are: rounded to nearest.
        plans = step.weights.plans
        InPlace(plans, ["nearest"] * len(plans), options["distribution"], step.backend).perturb(
            direction, scale
        )

    @torch.no_grad()
    def adamezo_restore(self) -> None:
        """Puts the unperturbed weights back, bit for bit."""
        for name, p in self.model_runner.model.named_parameters():
            if name in self._adamezo_copies:
                p.copy_(self._adamezo_copies[name])

    @torch.no_grad()
    def adamezo_update(self, rewards: list[float]) -> float:
        """The step that these rewards make, on the unperturbed weights. Returns their mean."""
        self.adamezo_restore()
        given = iter(rewards)
        mean = self._adamezo.step(lambda: next(given)).item()
        for name, p in self.model_runner.model.named_parameters():
            if name in self._adamezo_copies:
                self._adamezo_copies[name].copy_(p)
        return mean

    def adamezo_weights(self) -> dict[str, Tensor]:
        """Copies of the weights, by vLLM's names."""
        return {name: copy.clone() for name, copy in self._adamezo_copies.items()}


class RewardSteps:
    """Steps on the weights of a vLLM engine, by rewards of what it generates.

    Args:
        llm: a ``vllm.LLM`` made with ``worker_extension_cls`` as above, and one worker: with
            several each would have a shard of the weights under the directions of a whole.
        method: the name of an optimizer of this package.
        options: of the optimizer; ``seed`` is required. ``perturbation`` is out of place.
    """

    def __init__(self, llm: Any, method: str, **options: Any) -> None:
        if options.get("seed") is None or not options.get("maximize"):
            raise ValueError(
                "expected seed=..., which names the run's directions, and maximize=True, as "
                f"rewards are to grow; got {options}"
            )
        self._llm = llm
        workers = llm.collective_rpc("adamezo_begin", args=(method, options))
        if len(workers) != 1:
            raise ValueError(f"got {len(workers)} workers, expected 1: tensor_parallel_size=1")
        self.names: list[str] = workers[0]

    def step(self, reward: Callable[[], float | Sequence[float]]) -> float:
        """One step. Returns the mean reward over its evaluations.

        Args:
            reward: generates with the engine, and returns a reward, or one of each completion.
                The same prompts and the same sampling seeds each time within a step.
        """
        rewards = []
        try:
            for index in range(self._call("adamezo_probes")):
                self._call("adamezo_perturb", index)
                self._forget_cache()
                got = reward()
                if isinstance(got, (int, float)):
                    rewards.append(float(got))
                else:
                    rewards.append(sum(map(float, got)) / len(got))
        finally:
            self._call("adamezo_restore")
            self._forget_cache()
        return float(self._call("adamezo_update", rewards))

    def _forget_cache(self) -> None:
        """Keys and values of prompts were computed with other weights."""
        if self._llm.reset_prefix_cache() is False:
            raise RuntimeError(
                "vLLM did not reset its cache of prefixes, whose keys and values are of other "
                "weights: wait for all requests, or make the engine with "
                "enable_prefix_caching=False"
            )

    def _call(self, method: str, *args: Any) -> Any:
        (result,) = self._llm.collective_rpc(method, args=args)
        return result
