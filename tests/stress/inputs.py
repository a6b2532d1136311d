"""Bad losses, closures, options, sizes and states."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from typing import Any

import torch
from torch import nn

from adamezo import AdaMeZO
from adamezo.engine.optimizer import ZerothOrder

from .small import came_back, expect, history, loss_of, make_optimizer, small, values

BAD_LOSSES: tuple[Any, ...] = (
    None,
    "1.0",
    True,
    1j,
    (1.0,),
    [torch.tensor(1.0)],
    {"logits": 1.0},
    torch.ones(3),
    torch.ones(0),
    torch.ones(2, 2),
    torch.tensor(1j),
    torch.tensor(1.0).to_sparse(),
    torch.tensor(1.0).to(torch.float8_e5m2),
    10**400,
    torch.tensor(True),
    torch.ones((), device="meta"),
)
BAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (-1.0, math.nan, math.inf, "a", None, torch.ones(2)),
    "betas": ((), (0.5,), (1.0, 0.5), (0.5, -0.1), (0.5, math.nan), None, 0.5, ("a", "b")),
    "eps": (0.0, -1.0, math.nan, math.inf, "a", None),
    "zo_eps": (0.0, -1.0, math.nan, math.inf, "a", None),
    "horizon": (0, -1, 1.5, True, "a", None),
    "weight_decay": (-1.0, math.nan, math.inf, "a", None),
    "normalization": ("adam", None, 3),
    "warmup_lr": (-1.0, math.nan, math.inf, "a"),
    "distribution": ("cauchy", None, 3),
    "rounding": ("up", None, 3),
    "perturbation": ("outplace", None, 3),
    "nonfinite": ("ignore", None, 3),
    "max_skipped": (0, -1, 1.5, True, None),
    "seed": (-1, 2**64, 0.5, True, "a"),
    "no_such_option": (1,),
}


def _writes(model: nn.Module, chosen: random.Random) -> None:
    p = chosen.choice(list(model.parameters()))
    chosen.choice([lambda: p.add_(1), lambda: p.zero_(), lambda: p.mul_(2)])()


def _replaces(model: nn.Module, chosen: random.Random) -> None:
    p = chosen.choice(list(model.parameters()))
    p.data = chosen.choice([p.clone(), p.double(), p.flatten()[:3].clone(), p.half()])


def bad_inputs(count: int, seed: int = 0) -> Counter[str]:
    """Random bad losses, closures that touch the weights, options, states and sizes. Every one has
    to be a TypeError, ValueError or RuntimeError with a message, and to leave the run as it was."""
    chosen = random.Random(seed)
    seen: Counter[str] = Counter()
    exact = False
    for number in range(count):
        if number % 50 == 0:
            exact = not exact
            model = small()
            optimizer = make_optimizer(model, exact)
            optimizer.step(loss_of(model))
        kind = chosen.choice(["loss", "closure that replaces", "option", "size", "state"])
        before, kept = values(model), history(optimizer)
        kept_options = copy.deepcopy(optimizer.state_dict())
        try:
            if kind == "loss":
                losses = [1.0] * chosen.randrange(2) + [chosen.choice(BAD_LOSSES)]
                optimizer.step(lambda losses=losses: losses.pop(0))
            elif kind == "closure that replaces":
                optimizer.step(lambda model=model: (_replaces(model, chosen), 1.0)[1])
            elif kind == "option":
                name = chosen.choice(list(BAD_OPTIONS))
                AdaMeZO(model.parameters(), **{name: chosen.choice(BAD_OPTIONS[name])})
            elif kind == "size":
                p = chosen.choice(list(model.parameters()))
                data = p.data
                p.data = torch.zeros(7, dtype=p.dtype)
                try:
                    optimizer.step(loss_of(model))
                finally:
                    p.data = data
            else:
                optimizer.load_state_dict(bad_state(optimizer, chosen))
        except (TypeError, ValueError, RuntimeError) as error:
            expect(len(str(error)) > 10, f"{kind}: {error!r} says nothing")
        else:
            expect(False, f"a bad {kind} was accepted")
        expect(history(optimizer) == kept, f"{kind}: the history advanced")
        expect(optimizer.state_dict() == kept_options, f"{kind}: options have changed")
        after = values(model)
        expect(came_back(before, after, kept[0]["next_direction"], exact), f"{kind}: weights lost")
        seen[kind] += 1
    return seen


def bad_state(optimizer: ZerothOrder, chosen: random.Random) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    group = state["param_groups"][0]
    way = chosen.randrange(6)
    if way == 0:
        del group[chosen.choice([k for k in group if k != "param_names"])]
    elif way == 1:
        name = chosen.choice(["distribution", "normalization", "method", "stream_version"])
        group[name] = chosen.choice(["fast", "official", "Adam", 2, None])
    elif way == 2:
        group["projected_grads"] = chosen.choice([[math.nan], [1.0] * 9, None, ["a"], [[]], "abcd"])
    elif way == 3:
        group["directions"] = chosen.choice([[-1], [5], [0, 0], None, ["0"], [0.0], {}])
    elif way == 4:
        group["params"] = group["params"][1:]
    else:
        return chosen.choice([None, [], {}, 3, {"state": {}}, {"param_groups": []}, {"state": 1}])
    return state


def closures_that_write(count: int, seed: int = 0) -> int:
    """Closures that write to weights: seen each time, by name."""
    chosen = random.Random(seed)
    for number in range(count):
        model = small()
        optimizer = make_optimizer(model, exact=number % 2 == 0)
        kept = history(optimizer)
        try:
            with torch.no_grad():
                optimizer.step(lambda model=model: (_writes(model, chosen), 1.0)[1])
        except RuntimeError as error:
            # What reads and writes outside of all modules is refused before that, if exact.
            told = "the closure has written to" in str(error) or "outside of all" in str(error)
            expect(told, f"unexpected: {error}")
        else:
            expect(False, "a closure wrote to the weights unseen")
        expect(history(optimizer) == kept, "the history advanced")
    return count
