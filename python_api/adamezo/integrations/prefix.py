"""Prefix tuning of transformers language models: trained keys and values in front of every text.

peft has prefixes too. This one differs in two points that zeroth-order training needs. It is put
into the model that it is given, so all adapters are handled in one way, and it begins as the keys
and values of real tokens, as MeZO's code does (arXiv 2305.17333). Besides, it keeps the positions
that a caller gives for texts that are padded on the left, which peft ignores.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import Cache, DynamicCache
except ImportError as error:
    raise ImportError(
        "a prefix needs the transformers package: pip install 'adamezo[transformers]'"
    ) from error


class Prefix(nn.Module):
    """Keys and values of some positions, for each layer of a model.

    Args:
        states: of shape (layers, 2, heads, positions, size of a head).
    """

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = nn.Parameter(states)

    def forward(self, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """For each layer its keys and values, of shape (rows, heads, positions, size)."""
        return [
            (keys[None].expand(rows, -1, -1, -1), values[None].expand(rows, -1, -1, -1))
            for keys, values in self.states.to(dtype)
        ]

    def extra_repr(self) -> str:
        return f"{self.states.shape[3]} positions"


def make(model: nn.Module, length: int, seed: int) -> Prefix:
    """A prefix that holds the keys and values of random tokens in this model."""
    accepted = inspect.signature(model.forward).parameters
    if "past_key_values" not in accepted or "input_ids" not in accepted:
        raise ValueError(
            f"a {type(model).__name__} takes no past_key_values, which a prefix is given to the "
            "model as: take a causal language model, or another scheme"
        )
    if length < 1:
        raise ValueError(f"Invalid length: {length}, expected a positive number of positions")
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(embedding.num_embeddings, (1, length), generator=generator)
    training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(input_ids=ids.to(embedding.weight.device), use_cache=True)
    finally:
        model.train(training)
    cache = output.past_key_values
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    shapes = {layer.keys.shape for layer in getattr(cache, "layers", ()) if "keys" in vars(layer)}
    if kinds != {"DynamicLayer"} or len(shapes) != 1:
        raise ValueError(
            f"a {type(model).__name__} keeps {sorted(kinds) or type(cache).__name__} for its "
            "layers, expected plain keys and values of one shape: take another scheme"
        )
    states = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return Prefix(torch.stack(states).float())


def attach(model: nn.Module, prefix: Prefix) -> list[Any]:
    """Lets every forward of the model see the prefix. Returns handles with ``remove``."""
    model.prefix = prefix
    return [
        model.register_forward_pre_hook(_with_prefix, with_kwargs=True),
        model.register_forward_hook(_without_cache, with_kwargs=True),
    ]


def _with_prefix(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward with the prefix in its cache.

    A cache that already holds tokens, as in the later steps of ``generate``, has the prefix too.
    """
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ValueError(
            "gradient checkpointing takes the cache from the layers, and the prefix with it: call "
            "model.gradient_checkpointing_disable(), as forward passes alone need none"
        )
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    ids = given.get("input_ids")
    tokens: Tensor = given["inputs_embeds"] if ids is None else ids
    weight = model.get_input_embeddings().weight
    rows, length = tokens.shape[0], model.prefix.states.shape[3]
    cache = given.get("past_key_values")
    if cache is None:
        cache = DynamicCache(config=model.config)
    if cache.get_seq_length() == 0:
        for index, (keys, values) in enumerate(model.prefix(rows, weight.dtype)):
            cache.update(keys, values, index)
        cache.has_prefix = True
    elif not hasattr(cache, "has_prefix"):
        raise ValueError(
            f"past_key_values: got a cache of {cache.get_seq_length()} tokens without a prefix, "
            "expected none, an empty one or one that this model has filled"
        )
    given["past_key_values"] = cache
    mask = given.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask: got the shape {tuple(mask.shape)}, expected (rows, tokens), in "
                "front of which the prefix is put"
            )
        given["attention_mask"] = torch.cat([mask.new_ones(rows, length), mask], dim=1)
    for name in ("position_ids", "cache_position"):
        if given.get(name) is not None:
            given[name] = given[name] + length
    return (), given


def _without_cache(model: Any, args: object, kwargs: dict[str, Any], output: Any) -> Any:
    """The output without the cache of the prefix, if the caller did not want a cache: ``generate``
    would go on with it."""
    wanted = kwargs.get("use_cache")
    if model.config.use_cache if wanted is None else wanted:
        return output
    if isinstance(output, tuple):
        return tuple(part for part in output if not isinstance(part, Cache))
    # Without the name, too, which generate looks for.
    return type(output)(**{n: part for n, part in output.items() if n != "past_key_values"})
