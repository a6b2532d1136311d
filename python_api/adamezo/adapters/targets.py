"""Where adapters go: modules of a model, by patterns of their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

SIDES = ("input", "output")

Targets = str | Sequence[str] | Mapping[str, str]
"""Patterns of module names, or for each pattern the side of the module that an adapter is on."""


@dataclass(frozen=True)
class Family:
    """Where the published codes put adapters into models of one kind."""

    residual: Mapping[str, str]
    """Residual adapters: on the input or the output of these. LLM-Adapters (arXiv 2304.01933), from
    which the code of AdaZeta comes, has these places."""
    beside: tuple[str, ...]
    """The linear layers that LoRA changes: the queries and values, as MeZO has them."""


_GATED = Family(
    {"gate_proj": "input", "up_proj": "input", "down_proj": "output"}, ("q_proj", "v_proj")
)
FAMILIES = {
    "llama": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "opt": Family({"fc1": "input", "fc2": "output"}, ("q_proj", "v_proj")),
    "roberta": Family({"output.dense": "output"}, ("query", "value")),
}
"""By transformers' ``config.model_type``."""


def family_of(model: nn.Module) -> Family:
    """The family of a model of transformers, which has published places for adapters."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        what = f"models of the type {kind!r} have" if kind else f"a {type(model).__name__} has"
        raise ValueError(
            f"{what} no published places for adapters, only {', '.join(FAMILIES)} do: pass "
            f"targets, patterns of module names such as {_linears(model)}"
        )
    return FAMILIES[kind]


def sides_of(targets: Targets) -> dict[str, str]:
    """The patterns with their sides; ``"output"`` where none is given."""
    if isinstance(targets, Mapping):
        sides = dict(targets)
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        sides = dict.fromkeys(patterns, "output")
    wrong = {k: v for k, v in sides.items() if not isinstance(k, str) or v not in SIDES}
    if wrong or not sides:
        raise ValueError(
            f"Invalid targets: {targets!r}, expected patterns of module names, or a dict from each "
            f"pattern to one of {SIDES}"
        )
    return sides


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a module's whole name, or its end after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def find(model: nn.Module, sides: Mapping[str, str]) -> dict[str, str]:
    """The names of the modules that the patterns match, in the model's order, with their sides.

    Other modules than linear layers are passed over.

    Raises:
        ValueError: a pattern matches no linear layer, or two match the same one; the message
            says which.
    """
    places: dict[str, str] = {}
    unused = set(sides)
    for name, module in model.named_modules():
        found = [pattern for pattern in sides if is_linear(module) and matches(name, pattern)]
        if len(found) > 1:
            raise ValueError(f"targets: {found[0]!r} and {found[1]!r} both match {name}")
        for pattern in found:
            unused.discard(pattern)
            places[name] = sides[pattern]
    if unused:
        raise ValueError(
            f"targets: {sorted(unused)[0]!r} matches no linear layer (one with in_features and "
            f"out_features) of this {type(model).__name__}, which has {_linears(model)}"
        )
    return places


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that is called, and not one whose weight
    nn.MultiheadAttention reads without a call, so that an adapter would never run."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


def _linears(model: nn.Module) -> str:
    """The last names of a model's linear layers, the first few."""
    names = dict.fromkeys(
        name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m) and name
    )
    return ", ".join(map(repr, list(names)[:8])) or "no linear layers"
