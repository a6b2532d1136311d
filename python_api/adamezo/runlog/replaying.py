"""The steps of a log, taken again: by an optimizer, or from one file of weights to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import adapt, adapters_of, save_adapters
from ..adapters.insertion import is_adapted
from ..engine.optimizer import ZerothOrder
from ..engine.records import StepRecord
from .format import Header, Log, LogError, is_completed, read
from .header import check_same, header_of, optimizer_for

Progress = Callable[[Sequence[StepRecord]], Iterable[StepRecord]]
"""Yields the records that it is given, to show a progress bar for example."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def replay(
    log: Log,
    optimizer: ZerothOrder,
    *,
    until: int | None = None,
    progress: Progress = iter,
) -> int:
    """Takes the steps of a log again, without evaluating a model.

    Args:
        log: what :func:`read` returned.
        optimizer: on the base weights, in its state at the beginning of the log: made by
            :func:`optimizer_for`, or with the same arguments as the optimizer that was logged.
        until: the number of steps to take; None takes all.
        progress: called with the records; it yields them.

    Returns:
        The number of steps taken.

    Raises:
        LogError: weights or options differ from those at the beginning of the log; the log has
            fewer steps than ``until``; a record is impossible. The message says which.
    """
    check_same(log.header, header_of(optimizer, log.header.run))
    return take_steps(log, optimizer, until, progress)


def take_steps(
    log: Log, optimizer: ZerothOrder, until: int | None, progress: Progress, *, begin: int = 0
) -> int:
    """The same for an optimizer that has been compared with the header of the log, and is behind
    its first ``begin`` records."""
    records, steps = [], 0
    if until is not None and not 0 <= until <= log.steps:
        raise LogError(f"the log has {log.steps} steps, there is no step {until}")
    for number, record in enumerate(log.records, start=1):
        if steps == until:
            break
        if record.outcome == "broken":
            raise LogError(
                f"record {number} is of a step that failed half-way, so the weights after it are "
                f"unknown. Those before it are at step {steps}"
            )
        records.append(record)
        steps += is_completed(record)
    for number, record in enumerate(progress(records[begin:]), start=begin + 1):
        try:
            optimizer.replay(record)
        except ValueError as error:
            raise LogError(f"record {number}: {error}") from error
    return steps


def replay_file(
    base: str | Path,
    log: str | Path,
    out: str | Path,
    *,
    until: int | None = None,
    progress: Progress = iter,
) -> int:
    """Replays a log onto weights in a file or folder, and writes the result.

    Args:
        base: a ``.safetensors`` file, a ``state_dict`` written by ``torch.save``, or a model that
            ``adamezo finetune`` accepts: a folder or a ``.gguf`` file.
        log: the log.
        out: a file ending in ``.safetensors``, ``.pt``, ``.pth`` or ``.bin``; or a folder, if the
            base is a model.
        until, progress: see :func:`replay`.

    Returns:
        The number of steps taken.

    Raises:
        LogError, OSError: see :func:`read`, :func:`optimizer_for` and :func:`replay`.
    """
    base, out = Path(base).expanduser(), Path(out).expanduser()
    contents = read(log)
    is_model = base.is_dir() or base.suffix == ".gguf"
    if out.suffix not in _SUFFIXES and (not is_model or out.suffix):
        raise LogError(
            f"{out}: expected a name ending in {', '.join(_SUFFIXES)}"
            + (", or a folder" if is_model else "")
        )
    if is_model:
        from ..integrations import transformers as language_models

        model, tokenizer = language_models.load(base, dtype=_dtype(contents.header))
        if "adapt" in contents.header.run:
            _adapt(model, contents.header)
        tensors = dict(model.named_parameters())
    else:
        tensors = _load(base)
    optimizer = optimizer_for(contents.header, tensors)
    steps = take_steps(contents, optimizer, until, progress)
    if is_model and is_adapted(model):
        tensors = dict(adapters_of(model))
    elif is_model:
        tensors = model.state_dict()
    if is_model and is_adapted(model) and not out.suffix:
        save_adapters(model, out)
    elif is_model and not out.suffix:
        language_models.save(model, tokenizer, out)
    else:
        _save(tensors, out)
    return steps


def _dtype(header: Header) -> torch.dtype:
    """The type of the weights of the model that a log is of."""
    if "adapt" in header.run:  # adapters are float32 in models of any type
        dtypes = {str(header.run.get("dtype"))}
    else:
        dtypes = {entry.dtype for entry in header.manifest}
    if len(dtypes) != 1:
        raise LogError(
            f"the log has weights of the types {sorted(dtypes)}, but a model is loaded in one "
            "type: pass its weights in a file"
        )
    name = dtypes.pop()
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise LogError(f"the log is of weights of the type {name!r}, which torch does not have")
    return dtype


def _adapt(model: nn.Module, header: Header) -> None:
    """Puts those adapters into a model that ``adamezo finetune`` had begun the log with."""
    try:
        adapt(model, header.run["adapt"], seed=header.run["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise LogError(f"the adapters of the log cannot be made: {error}") from error


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from ..integrations import safetensors

        return safetensors.load(path)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise LogError(f"{path}: expected a state_dict, tensors by their names")
    return tensors


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        from ..integrations import safetensors

        safetensors.save(tensors, path)
    else:
        torch.save(tensors, path)
