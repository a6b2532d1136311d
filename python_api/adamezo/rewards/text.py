"""Rewards of texts that a transformers model generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..engine.optimizer import ZerothOrder
from ..integrations.generation import completions
from .shaping import SHAPINGS

RewardFunction = Callable[..., Sequence[float]]
"""Called with ``prompts`` and ``completions``, lists of texts, and the columns of the step, by
name, as trl calls its own; returns a number for each completion, and more is better."""


class TextReward:
    """The mean reward of a model's completions as the objective of steps.

    Args:
        model: of transformers, with ``generate``. It is put into evaluation mode for a step.
        tokenizer: encodes prompts and decodes completions.
        reward: see :data:`~adamezo.rewards.text.RewardFunction`.
        shaping: ``"none"``, ``"z-score"`` or ``"rank"``, over the evaluations of a step.
        batch_size: how many prompts are completed at once; None takes all.
        generate: options of ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, ...
            Without ``do_sample=True`` it is greedy. Samples are drawn with the same random numbers
            in all evaluations of a step.

    Attributes:
        completions (list[str]): those of the last evaluation.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reward: RewardFunction,
        *,
        shaping: str = "z-score",
        batch_size: int | None = None,
        **generate: Any,
    ) -> None:
        if shaping not in SHAPINGS:
            raise ValueError(f"Invalid shaping: {shaping!r}, expected one of {tuple(SHAPINGS)}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"Invalid batch_size: {batch_size!r}, expected at least 1, or None")
        self.model, self.tokenizer = model, tokenizer
        self.completions: list[str] = []
        self._reward, self._shaping = reward, SHAPINGS[shaping]
        self._batch_size = batch_size
        self._generate = {"do_sample": False, **generate}

    def evaluate(self, prompts: Sequence[str], **columns: Sequence[Any]) -> float:
        """The mean reward at the weights as they are.

        Args:
            prompts: texts, with a chat's template already applied if there is one.
            columns: one value for each prompt, handed on to the reward function.
        """
        ids = self.tokenizer(list(prompts)).input_ids
        size = self._batch_size or len(ids)
        texts: list[str] = []
        for start in range(0, len(ids), size):
            rows = ids[start : start + size]
            texts += completions(self.model, self.tokenizer, rows, **self._generate)
        self.completions = texts
        rewards = self._reward(prompts=list(prompts), completions=texts, **columns)
        if len(rewards) != len(texts):
            raise ValueError(
                f"the reward function returned {len(rewards)} numbers for {len(texts)} "
                "completions, expected one for each"
            )
        return sum(map(float, rewards)) / len(texts)

    def step(
        self, optimizer: ZerothOrder, prompts: Sequence[str], **columns: Sequence[Any]
    ) -> float:
        """One step towards more reward. Returns the mean reward over its evaluations.

        Raises:
            ValueError: the optimizer would go towards less, as it lacks ``maximize=True``.
        """
        if not all(group["maximize"] for group in optimizer.param_groups):
            raise ValueError(
                "this optimizer minimizes, and would unlearn the reward: make it with maximize=True"
            )
        training = self.model.training
        before, optimizer.shaping = optimizer.shaping, self._shaping
        self.model.eval()
        try:
            return optimizer.step(lambda: self.evaluate(prompts, **columns)).item()
        finally:
            self.model.train(training)
            optimizer.shaping = before
