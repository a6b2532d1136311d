"""Settings to begin with: what was used for each kind of adapters, and what our runs advise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from . import methods
from .adapters.insertion import is_adapted, record_of
from .engine.optimizer import ZerothOrder

FULL = "none"
"""The scheme of a model without adapters, all weights of which are trained."""

OVER_ZO_EPS = ("FZOO", "GRZO")
"""Methods whose steps are proportional to lr / zo_eps."""

IN_16_BITS = 1e-2
"""The zo_eps that FZOO wants where trained weights are in bfloat16."""

FAR = 30
"""The factor of an lr from all those of its scheme at which `check_lr` warns."""


class Preset(NamedTuple):
    """An lr and a zo_eps, and who used them for what."""

    method: str
    scheme: str
    lr: float
    zo_eps: float
    source: str


_MEZO_OPT = "MeZO (arXiv 2305.17333), the commands of its code for OPT-13B"
_MEZO_ROBERTA = "MeZO (arXiv 2305.17333), the commands of its code for RoBERTa-large"
_ADAZETA = "AdaZeta (arXiv 2406.18060), its released run"
_FZOO = "FZOO (arXiv 2506.09034), its code's 5e-5, which has zo_eps inside"
_OURS = "docs/comparison_whole.md, SmolLM2-135M, 72 forward passes, lr searched and zo_eps not"
_LAYER = "docs/comparison.md, the last layer of SmolLM2-135M, 216 forward passes, lr searched"
_LONG = "docs/long_runs.md, the last layer of SmolLM2-135M, 2,000 forward passes, lr searched"
_DEFAULT = "AdaMeZO's default, for thousands of steps"

PRESETS = (
    Preset("MeZO", FULL, 1e-7, 1e-3, _MEZO_OPT),
    Preset("MeZO", FULL, 1e-6, 1e-3, _MEZO_ROBERTA),
    Preset("MeZO", FULL, 1e-4, 1e-3, _OURS),
    Preset("MeZO", "lora", 5e-5, 1e-2, _MEZO_OPT),
    Preset("MeZO", "lora", 1e-4, 1e-3, _MEZO_ROBERTA),
    Preset("MeZO", "lora", 3.16e-3, 1e-3, _OURS),
    Preset("MeZO", "prefix", 1e-3, 1e-1, _MEZO_OPT),
    Preset("MeZO", "prefix", 1e-2, 1e-1, _MEZO_ROBERTA),
    Preset("AdaZeta", "tensor-train", 1e-4, 1e-3, _ADAZETA),
    Preset("MeZO", "tensor-train", 3.16e-3, 1e-3, _LAYER),
    Preset("AdaZeta", "tensor-train", 1e-2, 1e-3, _LAYER),
    Preset("AdaZeta", "tensor-train", 1e-3, 1e-3, _OURS),
    Preset("AdaZeta", FULL, 3.16e-4, 1e-3, _OURS),
    Preset("AdaZeta", "lora", 1e-2, 1e-3, _OURS),
    Preset("AdaMeZO", FULL, 1e-5, 1e-3, _DEFAULT),
    Preset("AdaMeZO", FULL, 1e-3, 1e-3, _OURS),
    Preset("AdaMeZO", "lora", 1e-2, 1e-3, _OURS),
    Preset("AdaMeZO", "tensor-train", 1e-2, 1e-3, _LAYER),
    Preset("FZOO", FULL, 5e-9, 1e-4, _FZOO),
    Preset("FZOO", FULL, 1e-6, 1e-4, _OURS),
    Preset("FZOO", "lora", 1e-5, 1e-4, _OURS),
    Preset("FZOO", "tensor-train", 5.62e-6, 1e-4, _LONG),
)
"""What was used, to begin a search from. There is no one best value, as that depends on the model
and on the number of steps."""


@dataclass(frozen=True)
class Recipe:
    """What to begin with, for one kind of trained weights: the best method of runs on one layer of
    a small model, a zo_eps that also bears products in 16 bits, and the best lr at that zo_eps.
    docs/recipes.md says which runs each part rests on."""

    scheme: str
    """Of :func:`adamezo.adapters.adapt`, or ``"none"`` for all weights."""
    method: str
    """The name of its class in `adamezo`."""
    lr: float
    """The best of that job. It is no lr of another model: :func:`adamezo.find_lr` finds one."""
    options: Mapping[str, Any]
    """zo_eps and distribution, as they were there. FZOO's steps are proportional to lr / zo_eps."""

    def optimizer(self, model: nn.Module, *, lr: float, **changed: Any) -> ZerothOrder:
        """The recipe's optimizer of all that a model trains.

        Args:
            model: with the scheme's adapters, or without any to train all weights.
            lr: :attr:`lr` if nothing better is known. Then let :func:`adamezo.find_lr` replace it.
            changed: other options of the method, such as ``seed``; those of the recipe too. Where
                weights in bfloat16 are trained, pass what docs/recipes.md has for them; without it
                there is a warning.
        """
        scheme = scheme_of(model)
        if scheme != self.scheme:
            hint = f"take adamezo.presets.RECIPES[{scheme!r}]"
            raise ValueError(
                f"got a model that trains {_name(scheme)}, expected {_name(self.scheme)}: "
                f"{hint if scheme in RECIPES else f'there are recipes for {list(RECIPES)} alone'}"
            )
        method: type[ZerothOrder] = getattr(methods, self.method)
        made = method.for_model(model, lr=lr, **{**self.options, **changed})
        _check_16_bits(made)
        return made

    def scheduler(self, optimizer: ZerothOrder, steps: int) -> LinearLR:
        """An lr that falls linearly from what it is to 0. Call ``step()`` after every step."""
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps: got {steps!r}, expected an integer of at least 1")
        return LinearLR(optimizer, 1.0, 0.0, steps)


def _check_16_bits(optimizer: ZerothOrder) -> None:
    """Warns where weights in bfloat16 are trained without what runs of such weights wanted."""
    for group in optimizer.param_groups:
        in_place, size = group["perturbation"] == "inplace", float(group["zo_eps"])
        if (in_place or size < IN_16_BITS) and any(
            p.requires_grad and p.dtype == torch.bfloat16 for p in group["params"]
        ):
            warnings.warn(
                f"got weights in bfloat16 with zo_eps={size:g} and "
                f"perturbation={group['perturbation']!r}: in place they drift, and with a zo_eps "
                f"below {IN_16_BITS:g} FZOO's lead was lost. Pass zo_eps={IN_16_BITS:g}, "
                "perturbation='out_of_place', and an lr that is higher by the same factor as "
                "zo_eps (docs/recipes.md)",
                UserWarning,
                stacklevel=3,
            )


_OF_PEFT = {"adalora": "lora", "prefix_tuning": "prefix"}
"""By the name of a kind of peft's adapters: ours, where it is another."""

RECIPES: Mapping[str, Recipe] = {
    recipe.scheme: recipe
    for recipe in (
        Recipe(FULL, "FZOO", 1.78e-5, {"zo_eps": 1e-3, "distribution": "rademacher"}),
        Recipe("lora", "FZOO", 1e-4, {"zo_eps": 1e-3, "distribution": "rademacher"}),
        Recipe("tensor-train", "FZOO", 5.62e-5, {"zo_eps": 1e-3, "distribution": "rademacher"}),
    )
}
"""By the scheme of what is trained."""


def scheme_of(model: nn.Module) -> str:
    """The scheme of the adapters of a model or of a part of it, as :func:`adamezo.adapters.adapt`
    names it, also of peft's LoRA and prefixes; for another kind of peft's its name there, such as
    ``"ia3"``; ``"none"`` where there are no adapters."""
    for module in model.modules():
        if is_adapted(module):
            return record_of(module).scheme
        for config in getattr(module, "peft_config", {}).values():
            kind = str(getattr(config, "peft_type", "")).rpartition(".")[2].lower()
            return _OF_PEFT.get(kind, kind)
    return FULL


def known(method: str, scheme: str) -> tuple[Preset, ...]:
    """Those of a method, by the name of its class, and of a scheme, or ``"none"`` for all weights.

    MeZO's are those of AdaZeta too, which takes its steps. Empty where none is known.
    """
    taken = ("MeZO", "AdaZeta") if method in ("MeZO", "AdaZeta") else (method,)
    return tuple(p for p in PRESETS if p.method in taken and p.scheme == scheme)


def check_lr(optimizer: ZerothOrder, model: nn.Module) -> None:
    """Warns where an lr looks like that of another scheme.

    Good learning rates differ by a factor of 1,000 and more between all weights, LoRA and prefixes.
    There is a warning if a group's lr is a factor of 30 or more from all presets of the method for
    the model's adapters; of FZOO and GRZO, whose steps are proportional to lr / zo_eps, from what
    these are at the group's zo_eps. Nothing is said where no preset is known.

    Args:
        optimizer: of the model's adapters, or of all its weights.
        model: with or without adapters of :func:`adamezo.adapters.adapt`, or peft's LoRA.
    """
    scheme = scheme_of(model)
    for group in optimizer.param_groups:
        method, lr = _method(optimizer, group), float(group["lr"])
        presets = known(method, scheme)
        if not presets or lr <= 0:
            continue
        there = zip(_at(group["zo_eps"], presets), presets, strict=True)
        near, preset = min(there, key=lambda pair: _factor(pair[0].lr, lr))
        # Floats: 3e-3 over 1e-4 is 29.999999999999996.
        if _factor(near.lr, lr) < FAR * (1 - 1e-9):
            continue
        others = [p for p in PRESETS if p in known(method, p.scheme) and p.scheme != scheme]
        others = _at(group["zo_eps"], others)
        other = min(others, key=lambda preset: _factor(preset.lr, lr), default=None)
        hint = ""
        if other is not None and _factor(other.lr, lr) < _factor(near.lr, lr):
            hint = f" It looks like one for {_name(other.scheme)} ({other.lr:g}, {other.source})."
        at = f"with zo_eps={near.zo_eps:g}"
        if near.zo_eps != preset.zo_eps:
            at += f", where its steps are those of {preset.lr:g} with zo_eps={preset.zo_eps:g}"
        warnings.warn(
            f"{method} has lr={lr:g} on {_name(scheme)}, for which {near.lr:g} is the nearest that "
            f"is known ({at}; {near.source}): a factor of "
            f"{_factor(near.lr, lr):.0f}.{hint} adamezo.presets.known({method!r}, {scheme!r}) "
            "has all of them",
            UserWarning,
            stacklevel=2,
        )


def _at(zo_eps: float, presets: Sequence[Preset]) -> list[Preset]:
    """Presets with the lr whose steps are as long at another zo_eps."""
    return [
        p._replace(lr=p.lr * zo_eps / p.zo_eps, zo_eps=zo_eps) if p.method in OVER_ZO_EPS else p
        for p in presets
    ]


def _method(optimizer: ZerothOrder, group: dict[str, Any]) -> str:
    """The method whose learning rates an optimizer has."""
    name = type(optimizer).__name__
    if name == "AdaMeZO" and group["betas"][1] == 0:  # v is 1, and nothing divides the steps
        name = "MeZO"
    scaled = group.get("normalization") == "official"  # 100 times as long
    return f"{name}, official" if scaled else name


def _factor(a: float, b: float) -> float:
    return math.exp(abs(math.log(a / b)))


def _name(scheme: str) -> str:
    return "all weights" if scheme == FULL else f"{scheme} adapters"
