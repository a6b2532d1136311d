"""A header describes an optimizer and its weights: made, compared, and turned into one again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import methods
from ..engine.optimizer import ZerothOrder
from ..engine.options import plain, rename_values
from ..engine.sharded import whole
from .format import Entry, Header, Log, LogError, is_completed

NOT_LOGGED = (
    *("lr", "perturbation"),  # each record holds what they were in its step
    *("fused", "nonfinite", "max_skipped", "capturable", "differentiable"),
)
"""Options that may change while a log is written, since replaying its records gives the same
weights under all their values."""

_IDENTITY = ("method", "stream_version")
_CHUNK = 2**20


def header_of(
    optimizer: ZerothOrder, run: dict[str, Any] | None = None, *, reads_weights: bool = True
) -> Header:
    """The header of a log that begins with the optimizer and its weights as they are now. It is
    the same however these are divided among ranks, which gather DTensors for it one by one.

    Without ``reads_weights`` it has no hash of them, which takes a second for each gigabyte.
    """
    entries, tensors = [], []
    plans = zip(optimizer.plans(), optimizer.owners(), strict=True)
    for group, (plan, owners) in enumerate(plans):
        for segment, name, p in zip(plan, plan.names, owners, strict=True):
            dtype = str(p.dtype).removeprefix("torch.")
            entries.append(Entry(name, tuple(p.shape), dtype, segment.parameter, group))
            tensors.append(p)
    history = [_plain(group, _history(optimizer)) for group in optimizer.param_groups]
    return Header(
        groups=tuple(o | h for o, h in zip(logged_options(optimizer), history, strict=True)),
        counts=tuple(len(group["params"]) for group in optimizer.param_groups),
        manifest=tuple(entries),
        base=digest(tensors) if reads_weights else "",
        measured=optimizer.measured_per_step,
        run={} if run is None else json.loads(json.dumps(run)),
    )


def logged_options(optimizer: ZerothOrder) -> list[dict[str, Any]]:
    """The options of each group that may not change while a log is written, in JSON's types."""
    names = [name for name in optimizer.defaults if name not in NOT_LOGGED]
    return [_plain(group, [*names, *_IDENTITY]) for group in optimizer.param_groups]


def _history(optimizer: ZerothOrder | type[ZerothOrder]) -> list[str]:
    return [*optimizer.history, "steps", "next_direction"]


def _plain(group: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    values = ((name, plain(group[name])) for name in names)
    return {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in values}


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, each whole and in row-major order, concatenated."""
    hashed = hashlib.sha256()
    chunk = bytearray(_CHUNK)
    view = torch.frombuffer(chunk, dtype=torch.uint8)
    for tensor in tensors:
        if tensor.numel():
            elements = whole(tensor).detach().reshape(-1)
            if elements.stride() != (1,):  # reshape does not copy a single strided dimension
                elements = elements.clone(memory_format=torch.contiguous_format)
            for piece in elements.view(torch.uint8).split(_CHUNK):
                view[: len(piece)].copy_(piece)
                hashed.update(memoryview(chunk)[: len(piece)])
    return hashed.hexdigest()


def differences(log: Header, now: Header) -> list[str]:
    """The differences between the header of a log and that of a run, in words."""
    found = []
    if len(log.groups) != len(now.groups) or log.counts != now.counts:
        found.append(
            f"the log has groups of {list(log.counts)} parameters, here are {list(now.counts)}"
        )
    for i, (then, here) in enumerate(zip(log.groups, now.groups, strict=False)):
        found += _changes(then, here, f"group {i} had {{}}")
    then, here = {**log.run}, {**now.run}
    for run in (then, here):  # a log may be of a time when a value had another name
        rename_values(run)
    found += _changes(then, here, "{} was")
    for entry, other in zip(log.manifest, now.manifest, strict=False):
        if entry != other:
            found.append(f"{_text(entry)} is here {_text(other)}")
    if len(log.manifest) != len(now.manifest):
        found.append(f"{len(log.manifest)} tensors moved, here {len(now.manifest)} do")
    if not found and log.base != now.base:
        found.append("the weights are not those that it began with: their SHA-256 differs")
    return sorted(found)


def _changes(then: dict[str, Any], now: dict[str, Any], what: str) -> list[str]:
    return [
        f"{what.format(name)} {then.get(name)!r}, here it is {now.get(name)!r}"
        for name in then.keys() | now.keys()
        if then.get(name) != now.get(name)
    ]


def _text(entry: Entry) -> str:
    return f"{entry.name} (parameter {entry.parameter}, {entry.dtype}, {list(entry.shape)})"


def check_same(log: Header, now: Header) -> None:
    """Raises LogError unless the header of a log is that of the run."""
    found = differences(log, now)
    if found:
        more = f"; and {len(found) - 3} more" * (len(found) > 3)
        raise LogError(
            f"the log is of another run: {'; '.join(found[:3])}{more}. It continues with a new "
            "optimizer that has taken no step, of the same named parameters at their base weights, "
            f"with the options of the log (seed={log.groups[0].get('seed')}); another run needs a "
            "log of its own"
        )


def check_state_after(log: Log, optimizer: ZerothOrder) -> None:
    """Raises LogError unless an optimizer can be in the state after the last step of a log.

    Compared are options, parameters and counters: the weights are not known from a log alone.
    """
    header, now = log.header, header_of(optimizer, log.header.run, reads_weights=False)
    moving = _history(optimizer)

    def fixed(of: Header) -> Header:
        groups = tuple({k: v for k, v in g.items() if k not in moving} for g in of.groups)
        return replace(of, groups=groups, base="")

    found = differences(fixed(header), fixed(now))
    completed = [record for record in log.records if is_completed(record)]
    updates = sum(record.outcome == "updated" for record in completed)
    for i, (then, here) in enumerate(zip(header.groups, now.groups, strict=False)):
        if here["steps"] != then["steps"] + updates:
            found.append(
                f"group {i} has taken {here['steps']} steps, at the end of the log it has taken "
                f"{then['steps'] + updates}"
            )
        last = completed[-1].direction if completed else then["next_direction"] - 1
        if here["next_direction"] <= last or (
            not completed and here["next_direction"] != then["next_direction"]
        ):
            found.append(f"the next direction of group {i} is {here['next_direction']}")
    if found or (log.records and log.records[-1].outcome == "broken"):
        why = "; ".join(found[:3]) or "its last step failed half-way"
        raise LogError(
            f"the log does not end where this optimizer is: {why}. Load the "
            "checkpoint that was saved with this copy of the log"
        )


def optimizer_for(header: Header, tensors: Mapping[str, Tensor]) -> ZerothOrder:
    """An optimizer in the state that it had when the log began.

    Args:
        header: the header of the log.
        tensors: the base weights, by the names in the manifest. Replaying changes them in place.

    Raises:
        LogError: this version does not have the method or an option, or the weights are others;
            the message says which.
    """
    trained = {entry.parameter: entry.name for entry in header.manifest}
    missing = [name for name in trained.values() if name not in tensors]
    if missing:
        raise LogError(f"the base has no tensor {missing[0]!r}, nor {len(missing) - 1} others")
    # Frozen parameters take no part in a step, but parameters are counted with them.
    params = (
        (trained[i], Parameter(tensors[trained[i]]))
        if i in trained
        else (f"parameter {i}", Parameter(torch.empty(0), requires_grad=False))
        for i in count()
    )
    try:
        optimizer = _optimizer(header, [list(islice(params, size)) for size in header.counts])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise LogError(f"the options of the log cannot be used: {error}") from error
    check_same(header, header_of(optimizer, header.run))
    return optimizer


def _optimizer(header: Header, params: list[list[tuple[str, Parameter]]]) -> ZerothOrder:
    name = header.groups[0]["method"]
    if name not in methods.__all__:
        raise ValueError(f"the method is {name!r}, expected one of {methods.__all__}")
    method = getattr(methods, name)
    stored = [*_history(method), *_IDENTITY]
    options = [{k: v for k, v in group.items() if k not in stored} for group in header.groups]
    shared = {k: v for k, v in options[0].items() if k in method.shared_options}
    groups = [{**group, "params": p} for group, p in zip(options, params, strict=True)]
    optimizer = method(groups, lr=0.0, **shared)
    state = optimizer.state_dict()
    for group, saved in zip(header.groups, state["param_groups"], strict=True):
        saved.update({k: group[k] for k in stored})
    optimizer.load_state_dict(state)
    return optimizer
