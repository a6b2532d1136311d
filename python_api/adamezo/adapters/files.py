"""Adapters in a folder: ``adapters.json`` says what they are, ``adapters.safetensors`` has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .insertion import adapters_of, check_not_compiled, insert, is_adapted, record_of, remove
from .targets import is_linear, sides_of

_Model = TypeVar("_Model", bound=nn.Module)

TENSORS, DESCRIPTION = "adapters.safetensors", "adapters.json"
FORMAT = 1


def save_adapters(model: nn.Module, folder: str | Path) -> None:
    """Writes a model's adapters, and other parameters that are trained, such as those of a new
    head. The weights of the base are not written.

    Args:
        model: with adapters of :func:`adamezo.adapters.adapt`.
        folder: is made if need be. The names in its ``adapters.safetensors`` are those of the
            model, so that the file is also a base from which a log is replayed.
    """
    from ..integrations import safetensors

    record = record_of(model)
    own = adapters_of(model)
    kept = {n: p for n, p in model.named_parameters() if n in own or p.requires_grad}
    _check_have_values(kept)
    described = {
        "format": FORMAT,
        "scheme": record.scheme,
        "options": record.options,
        "places": record.places,
        "tensors": {name: _form(p) for name, p in kept.items()},
    }
    text = json.dumps(described, indent=1) + "\n"
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save(kept, folder / TENSORS)
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def load_adapters(model: _Model, folder: str | Path) -> _Model:
    """Puts saved adapters into a model.

    Args:
        model: a base without adapters, which is adapted as the saved model was; or one with such
            adapters, whose values are replaced, so that an optimizer of them stays valid.
        folder: what :func:`save_adapters` has written.

    Returns:
        The model itself.

    Raises:
        ValueError: the files are damaged, or the adapters are of another kind than the model's, or
            do not fit it; the message says which tensors. The model is then as it was.
    """
    from ..integrations import safetensors

    folder = Path(folder).expanduser()
    described = _described(folder / DESCRIPTION)
    tensors = safetensors.load(folder / TENSORS)
    _compare({n: _form(t) for n, t in tensors.items()}, described["tensors"], folder, DESCRIPTION)
    check_not_compiled(model)
    new = not is_adapted(model)
    if new:
        _insert(model, described, folder)
    try:
        record = record_of(model)
        for name in ("scheme", "options", "places"):
            here, saved = json.loads(json.dumps(getattr(record, name))), described[name]
            if here != saved:
                raise ValueError(
                    f"{folder}: the saved {name} are {saved!r}, the model has {here!r}"
                )
        parameters = dict(model.named_parameters())
        wanted = {
            n: _form(parameters[n]) for n in (*record.parameters, *tensors) if n in parameters
        }
        _compare({n: _form(t) for n, t in tensors.items()}, wanted, folder, "the model")
        _check_have_values({n: parameters[n] for n in tensors})
    except ValueError:
        if new:
            remove(model)
        raise
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
            parameters[name].requires_grad_(True)
    return model


def _insert(model: nn.Module, described: dict[str, Any], folder: Path) -> None:
    places: dict[str, str] = described["places"]
    layers = {name for name, module in model.named_modules() if is_linear(module)}
    missing = [name for name in places if name not in layers]
    if missing:
        raise ValueError(
            f"{folder}: the adapters do not fit this {type(model).__name__}, which has no linear "
            f"layer {missing[0]!r}" + f", nor {len(missing) - 1} others" * (len(missing) > 1)
        )
    if places:
        sides_of(places)
    try:
        insert(model, described["scheme"], places, described["options"], seed=0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error


def _check_have_values(parameters: Mapping[str, Tensor]) -> None:
    empty = [name for name, p in parameters.items() if p.is_meta]
    if empty:
        raise ValueError(
            f"{empty[0]} is on the meta device, which holds no values: load the model's weights "
            "(or call model.to_empty(...)) first"
        )


def _described(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    kinds = {"format": int, "scheme": str, "options": dict, "places": dict, "tensors": dict}
    if not isinstance(found, dict) or any(
        not isinstance(found.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"{path}: expected what save_adapters writes, with {', '.join(kinds)}")
    if found["format"] != FORMAT:
        raise ValueError(
            f"{path}: got format {found['format']}, expected {FORMAT}: it is of another version"
        )
    return found


def _form(tensor: Tensor) -> list[Any]:
    """Type and shape, as JSON has them."""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _compare(found: dict[str, Any], wanted: dict[str, Any], folder: Path, where: str) -> None:
    """Raises ValueError unless the tensors in a file have these names, types and shapes."""
    wrong = [f"{n} is {_text(f)}, in {where} {_text(wanted[n])}" for n, f in found.items()
             if n in wanted and wanted[n] != f]  # fmt: skip
    wrong += [f"{name} is not in {where}" for name in found if name not in wanted]
    wrong += [f"{name} of {where} is missing" for name in wanted if name not in found]
    if wrong:
        more = f"; and {len(wrong) - 3} more" * (len(wrong) > 3)
        raise ValueError(f"{folder / TENSORS} does not fit: {'; '.join(wrong[:3])}{more}")


def _text(form: Any) -> str:
    match form:
        case [str(kind), list(shape)]:
            return f"{kind} of shape {tuple(shape)}"
    return repr(form)  # of a damaged description
