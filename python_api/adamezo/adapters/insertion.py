"""Adapters in a model: put in, listed, merged, taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import Parameter

from .schemes import SCHEMES, Scheme
from .targets import Targets
from .tensor_train import whole

_Model = TypeVar("_Model", bound=nn.Module)

_RECORD = "_adamezo_adapters"


@dataclass(frozen=True)
class Adapted:
    """What :func:`adapt` has done to a model, which keeps this record."""

    scheme: str
    options: dict[str, Any]
    places: dict[str, str]
    """The modules that have an adapter, and its side of them."""
    parameters: tuple[str, ...]
    """The names of the adapters' parameters."""
    trained_before: tuple[str, ...]
    """The names of the parameters that required gradients before."""


def adapt(
    model: _Model,
    scheme: str = "tensor-train",
    *,
    targets: Targets | None = None,
    seed: int | None = None,
    **options: Any,
) -> _Model:
    """Freezes a model and puts adapters into it, whose parameters alone are trained then.

    Args:
        model: is changed, and keeps its modules and the names of its parameters; with LoRA these
            are as peft names them.
        scheme: a name in ``SCHEMES``. ``"tensor-train"``: AdaZeta's residual adapters on the input
            or output of linear layers. ``"tensor-train-linear"``: a tensor train beside linear
            layers. ``"lora"``: LoRA, by peft. ``"prefix"``: trained keys and values.
        targets: patterns of module names. One matches a whole name or its end after a dot, and may
            have ``*``. For ``"tensor-train"`` also a dict from patterns to ``"input"`` or
            ``"output"``, the side of the layer; the output if none is given. None: the published
            places of the model's family (docs/adapters.md).
        seed: of the adapters' first values; None draws one from torch's generator.
        options: of the scheme. ``"tensor-train"``: rank=5, bottleneck=64, activation="relu" (or
            "tanh"), bias=True, init="zero" (or "published").
            ``"tensor-train-linear"``: rank=5, bias=False, init="zero" (or "published").
            ``"lora"``: rank=8. ``"prefix"``: length=5.

    Returns:
        The model itself.

    Raises:
        ValueError: the model or a part of it has adapters already, its family is unknown, a
            pattern matches no linear layer, or an option is wrong. The model is then as it was.
    """
    kind = _scheme(scheme)
    chosen = _options(kind, options)
    _check_plain(model)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
    if not 0 <= whole("seed", seed) < 2**64:
        raise ValueError(f"Invalid seed: {seed!r}, expected an integer in [0, 2**64)")
    return insert(model, scheme, kind.places(model, targets), chosen, int(seed))


def insert(
    model: _Model, scheme: str, places: dict[str, str], options: dict[str, Any], seed: int
) -> _Model:
    """The same with modules by their names, and with all options."""
    kind = _scheme(scheme)
    _check_plain(model)
    before = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    new = {id(p) for p in kind.insert(model, places, _options(kind, options), seed)}
    for p in model.parameters():
        p.requires_grad_(id(p) in new)
    names = tuple(name for name, p in model.named_parameters() if id(p) in new)
    setattr(model, _RECORD, Adapted(scheme, options, places, names, before))
    return model


def _check_plain(model: nn.Module) -> None:
    check_not_compiled(model)
    for name, module in model.named_modules():
        if is_adapted(module):
            where = f"the model's part {name!r}" if name else "the model"
            raise ValueError(
                f"{where} has adapters of the scheme {record_of(module).scheme!r} already: take "
                "them out with remove(...), or merge(...), of what adapt was given"
            )


def check_not_compiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "got a compiled model, expected the one that torch.compile was given, in which "
            "parameters have the names that they have elsewhere. The compiled model runs what is "
            "put into that"
        )


def record_of(model: nn.Module) -> Adapted:
    """What :func:`adapt` has done to this model.

    Raises:
        ValueError: the model has no adapters.
    """
    check_not_compiled(model)
    found = getattr(model, _RECORD, None)
    if found is None:
        inner = [name for name, m in model.named_modules() if hasattr(m, _RECORD)]
        where = f"but its part {inner[0]!r} has: pass that" if inner else "adapt(model) makes some"
        raise ValueError(f"this {type(model).__name__} has no adapters; {where}")
    return found


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, _RECORD)


def adapters_of(model: nn.Module) -> dict[str, Parameter]:
    """The parameters of a model's adapters by their names, as an optimizer takes them:
    ``AdaZeta(adapters_of(model).items(), ...)``.

    Raises:
        ValueError: the model has no adapters, or has lost some.
    """
    names = record_of(model).parameters
    parameters = dict(model.named_parameters())
    lost = [name for name in names if name not in parameters]
    if lost:
        raise ValueError(
            f"the model has lost its adapter's {lost[0]!r}"
            + f" and {len(lost) - 1} others" * (len(lost) > 1)
            + ": a module that had an adapter was replaced, as resize_token_embeddings does with "
            "the head. Adapt a model after such a change"
        )
    return {name: parameters[name] for name in names}


def merge(model: _Model) -> _Model:
    """Adds adapters to the weights that they are beside, and takes them out.

    The sum is rounded to the weights' type once, to nearest. Possible for ``"tensor-train-linear"``
    and ``"lora"``.

    Raises:
        ValueError: residual adapters with a non-linearity and prefixes cannot be merged; nor can a
            layer take an adapter if its weights are quantised or shared with another module, or if
            the sum is not finite. The model is then as it was.
    """
    record = record_of(model)
    adapters_of(model)
    _scheme(record.scheme).merge(model, record.places)
    return _plain(model, record)


def remove(model: _Model) -> _Model:
    """Takes the adapters out: the model is what it was before :func:`adapt`, and trains the
    parameters that it trained then."""
    record = record_of(model)
    adapters_of(model)
    _scheme(record.scheme).remove(model, record.places)
    return _plain(model, record)


def _plain(model: _Model, record: Adapted) -> _Model:
    delattr(model, _RECORD)
    trained = set(record.trained_before)
    for name, p in model.named_parameters():
        if name in trained:
            p.requires_grad_(True)
    return model


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise ValueError(f"Invalid scheme: {name!r}, expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _options(scheme: Scheme, given: dict[str, Any]) -> dict[str, Any]:
    unknown = [name for name in given if name not in scheme.defaults]
    if unknown:
        raise ValueError(
            f"unknown options: {', '.join(unknown)}. The scheme {scheme.name!r} has "
            f"{', '.join(scheme.defaults)}"
        )
    return {**scheme.defaults, **{n: _option(scheme, n, value) for n, value in given.items()}}


def _option(scheme: Scheme, name: str, value: Any) -> Any:
    """An option as a plain value, which a description in JSON can hold."""
    default = scheme.defaults[name]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"Invalid {name}: {value!r}, expected True or False")
        return value
    if not isinstance(default, int):
        return value
    several = isinstance(value, (list, tuple)) and name in scheme.several
    numbers = [whole(name, each) for each in (value if several else [value])]
    if any(number < 1 for number in numbers):
        raise ValueError(f"Invalid {name}: {value!r}, expected positive numbers")
    return tuple(numbers) if several else numbers[0]
