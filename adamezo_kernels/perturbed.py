"""Products with perturbed weights that are never written: y = x (W + c Z)^T for a regenerated Z."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backends import Backend, choose, products, triton
from .call import checked_number
from .ops import perturb_
from .plan import Plan, Shard
from .stream import PhiloxState, check_state

BLOCK = 2**19
"""The most elements of a displaced block of rows of W, unless one row has more: 2 MiB in float32,
which stay in a cache until the product has read them."""


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    states: PhiloxState | Sequence[PhiloxState],
    scales: float | Sequence[float],
    *,
    parameter: int,
    distribution: str = "exact",
    bias: Tensor | None = None,
    backend: str | Backend | None = None,
) -> Tensor:
    """``y = x (W + c Z)^T + bias``, without gradients; W is read and nothing of its size is made.

    W + c Z is rounded to the type of W, to nearest even: each of its elements has the bits that
    :func:`perturb_` would give it in a copy of W. So y is that of the forward with such a copy, but
    for the order in which products are summed in float32.

    With N perturbations x is N blocks of as many rows, and block n is multiplied by W + c_n Z_n.
    The two sides of one direction are ``[state, state]`` with ``[c, -c]``.

    Args:
        x: of shape (..., in). With N perturbations the product of its leading sizes is a multiple
            of N, and the blocks follow each other in row-major order.
        weight: the whole parameter W, of shape (out, in) and x's type and device: float32, bfloat16
            or float16.
        states, scales: a direction and a finite c, or a sequence of N for either or both; a single
            one serves all N.
        parameter: the 24-bit index of the parameter W.
        distribution: one of DISTRIBUTIONS.
        bias: not perturbed here, of shape (out,), or (N, out) for one for each block.
        backend: as in :func:`sample_`.

    Where Triton can run, it adds c Z to tiles of W in registers and multiplies them with sums in
    float32. Elsewhere, and along low-rank directions, blocks of rows of W are displaced in a small
    memory and multiplied by torch, whose own settings then decide about sums.

    Returns:
        A tensor of shape (..., out) and x's type.

    Raises:
        TypeError, ValueError: what does not fit; the message says what was got and expected.
    """
    each = _pairs(states, scales)
    rows = _check(x, weight, bias, len(each))
    blocks = x.detach().reshape(len(each), rows, x.shape[-1])
    y = torch.empty(len(each), rows, weight.shape[0], dtype=x.dtype, device=x.device)
    plan = Plan([weight.detach()], parameters=[parameter], names=["weight"])
    chosen = choose(plan.devices, backend, distribution)
    with torch.no_grad():
        if _in_tiles(weight, distribution, chosen, backend):
            products.run(y, blocks, weight.detach(), parameter, each, distribution, bias)
        else:
            _by_blocks(y, blocks, plan, each, distribution, bias, chosen)
    return y.view(*x.shape[:-1], weight.shape[0])


def _in_tiles(
    weight: Tensor, distribution: str, chosen: Backend, named: str | Backend | None
) -> bool:
    """Whether Triton multiplies: where it was named, or on a GPU where nothing was."""
    if not products.serves(weight, distribution):
        return False
    if named or os.environ.get("ADAMEZO_BACKEND"):
        return chosen is triton
    return (
        weight.device.type != "cpu"
        and triton.supports(weight.device)
        and (triton.availability()[0])
    )


def _by_blocks(
    y: Tensor,
    x: Tensor,
    plan: Plan,
    each: list[tuple[PhiloxState, float]],
    distribution: str,
    bias: Tensor | None,
    backend: Backend,
) -> None:
    """Block by block of rows of W, each displaced in turn for every perturbation."""
    weight, parameter = plan.segments[0].tensor, plan.segments[0].parameter
    count, columns = weight.shape
    height = max(1, min(count, BLOCK // max(columns, 1)))
    memory = torch.empty(height, columns, dtype=weight.dtype, device=weight.device)
    for first in range(0, count, height):
        last = min(first + height, count)
        displaced = memory[: last - first]
        piece = Plan(
            [weight[first:last]],
            parameters=[parameter],
            shards=[Shard(first * columns, columns=columns)],
            names=["weight"],
        ).into([displaced])
        for n, (state, scale) in enumerate(each):
            perturb_(piece, state, scale, distribution=distribution, backend=backend)
            own = None if bias is None else bias[n] if bias.dim() == 2 else bias
            y[n, :, first:last] = linear(x[n], displaced, None if own is None else own[first:last])


def _pairs(
    states: PhiloxState | Sequence[PhiloxState], scales: float | Sequence[float]
) -> list[tuple[PhiloxState, float]]:
    """(direction, scale) of each perturbation."""
    of_states = [states] if isinstance(states, PhiloxState) else list(states)
    of_scales = list(scales) if isinstance(scales, Sequence) else [scales]
    count = max(len(of_states), len(of_scales))
    for name, values in (("states", of_states), ("scales", of_scales)):
        if len(values) not in (1, count):
            raise ValueError(f"got {len(values)} {name} for {count} perturbations, expected 1 or N")
    if not of_states or not of_scales:
        raise ValueError("got no states or no scales, expected at least one perturbation")
    for state in of_states:
        check_state(state)
        if state.offset:
            raise ValueError(f"expected directions without offset, got offset {state.offset}")
    of_scales = [checked_number("scale", scale) for scale in of_scales]
    return [(of_states[n % len(of_states)], of_scales[n % len(of_scales)]) for n in range(count)]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> int:
    """The number of rows of x for each of ``count`` perturbations."""
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected x of shape (..., in) and weight of shape (out, in), got {tuple(x.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if (x.dtype, x.device) != (weight.dtype, weight.device):
        raise TypeError(
            f"expected x and weight of one type on one device, got {x.dtype} on {x.device} and "
            f"{weight.dtype} on {weight.device}: cast x"
        )
    if bias is not None:
        shapes = [(weight.shape[0],), (count, weight.shape[0])]
        if tuple(bias.shape) not in shapes:
            raise ValueError(
                f"expected bias of shape {shapes[0]} or {shapes[1]}, got {tuple(bias.shape)}"
            )
        if (bias.dtype, bias.device) != (weight.dtype, weight.device):
            raise TypeError(
                f"expected bias of the weight's type and device, {weight.dtype} on "
                f"{weight.device}, got {bias.dtype} on {bias.device}"
            )
    rows = x.shape[:-1].numel()
    if rows % count:
        raise ValueError(
            f"x has {rows} rows, which are not {count} equal blocks: expected as many for each of "
            f"the {count} perturbations"
        )
    return rows // count
