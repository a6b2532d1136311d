"""Dropout in a batch of perturbations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .blocks import bound


class SharedDropout(TorchFunctionMode):
    """All blocks of a batch drop the same elements, as the evaluations of a step do."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout or function is torch.dropout:
            x, p, training, inplace = bound(args, kwargs, ("input", "p", "training", "inplace"))
            p = 0.5 if p is None else p
            if training is None or training:
                if x.shape[0] % self._count:
                    raise RuntimeError(
                        f"dropout of {x.shape[0]} rows, which are no batch of {self._count} "
                        "blocks: pass a closure that is not batched"
                    )
                pieces = x.unflatten(0, (self._count, -1))
                kept = F.dropout(torch.ones_like(pieces[0]), p, True)
                return (
                    x.copy_((pieces * kept).flatten(0, 1))
                    if inplace
                    else (pieces * kept).flatten(0, 1)
                )
        elif function is F.scaled_dot_product_attention:
            p = bound(args, kwargs, ("query", "key", "value", "attn_mask", "dropout_p"))[4]
            if p:
                raise RuntimeError(
                    "scaled_dot_product_attention would drop other elements in each perturbation "
                    f"of a batch (dropout_p={p}): call `model.eval()`, load the model with "
                    "attn_implementation='eager', or pass a closure that is not batched"
                )
        elif function in (F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d,
                          F.dropout3d):  # fmt: skip
            training = bound(args, kwargs, ("input", "p", "training"))[2]
            if training is None or training:
                raise RuntimeError(
                    f"{function.__name__} would drop other elements in each perturbation of a "
                    "batch: call `model.eval()`, or pass a closure that is not batched"
                )
        return function(*args, **kwargs)
