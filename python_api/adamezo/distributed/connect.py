"""The beginning of a run on several ranks: what is refused, and what is compared."""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..engine.known_model import check_has_all
from ..engine.optimizer import ZerothOrder
from ..engine.sharded import is_sharded, reshard
from .exchange import NO_CAPTURE, Connected
from .topology import Dimensions, topology_of


def connect(
    optimizer: ZerothOrder,
    ranks: ProcessGroup | DeviceMesh | None = None,
    *,
    data: Dimensions = None,
    queries: Dimensions = None,
    model: Dimensions = None,
    check_every: int = 100,
) -> Connected:
    """Lets the ranks of torch.distributed take the steps of an optimizer together.

    All ranks call this once, with the same options and weights, after the model was sharded, and
    from then on ``optimizer.step`` together::

        torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
        optimizer = AdaMeZO.for_model(model, lr=1e-5, seed=1)
        adamezo.distributed.connect(optimizer)
        for batch in this_ranks_part_of_the_data:
            optimizer.step(lambda: adamezo.LossSum.of(losses_of_samples(model, batch)))

    A step exchanges the losses of all ranks once, which are then the same numbers everywhere, as
    are all decisions that follow. With several parts of the batch the loss is the sum of the parts'
    sums over the sum of their weights, if the closure returns a :class:`adamezo.LossSum`; of plain
    losses it is their mean.

    Args:
        optimizer: with the ranks it becomes ``optimizer.ranks``, which is not saved, as the model
            is not. None there disconnects it.
        ranks: those of a process group or of a mesh; None takes all. Without a mesh, and with one
            of one dimension, each rank has its own part of the batch.
        data: the names of those dimensions of the mesh along which ranks have different parts of
            the batch, such as those of ``fully_shard``.
        queries: of those along which they evaluate different directions of a step, or sides of
            one, on the same batch. Perturbations in place are made on all ranks all the same, since
            they round; "out_of_place" and "regenerated" spare that.
        model: of those along which they evaluate the same together, such as those of tensor
            parallel. Their losses are taken from the first.
        check_every: after how many steps ranks compare checksums of what they hold of the weights,
            the first time here; 0 means never.

    Returns:
        The ranks, which is also ``optimizer.ranks``.

    Raises:
        RuntimeError: there is no process group.
        ValueError: a model that cannot be served (DistributedDataParallel, the first FSDP,
            ``capturable``), or dimensions without a role.
        RanksLost: ranks have other options, or other weights; the message names them.
    """
    if not isinstance(check_every, int) or isinstance(check_every, bool) or check_every < 0:
        raise ValueError(f"Invalid check_every: {check_every!r}, expected an integer, 0 or more")
    topology = topology_of(ranks, data, queries, model)
    known = optimizer.model
    _check_model(known)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    pieces = [p for p in params if is_sharded(p)]
    if known is not None:
        reshard(known)
        check_has_all(known, optimizer.param_groups, "ranks of torch.distributed")
        pieces += [p for p in known.parameters() if is_sharded(p)]
    if any(type(p).__name__ == "FlatParameter" for p in params):
        raise ValueError(f"the optimizer has FlatParameters: {_FSDP1}")
    device = next((p.device for p in params), None)
    if device is None:
        raise ValueError("the optimizer has no parameters")
    connected = Connected(topology, device, bool(pieces), check_every)

    if optimizer.param_groups[0]["capturable"]:
        raise ValueError(NO_CAPTURE)
    # Placements that cannot be served are refused by name, on all ranks if on one.
    connected.together(optimizer.plans)
    connected.compare_options(optimizer)
    connected.compare_weights(optimizer)
    optimizer.ranks = connected
    return connected


_FSDP1 = (
    "FullyShardedDataParallel packs several parameters into one, in which an element's place, and "
    "with it its direction, would be another. Take `torch.distributed.fsdp.fully_shard`"
)


def _check_model(model: nn.Module | None) -> None:
    for name, module in () if model is None else model.named_modules():
        kind = type(module).__name__
        where = f"the model{f' ({name})' if name else ''} is a {kind}"
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{where}, which keeps a gradient for every weight and exchanges none here: pass "
                "the model inside it (`model.module`) to the optimizer and to the closure"
            )
        if isinstance(module, nn.DataParallel):
            raise ValueError(f"{where}: expected one process for each device, as torchrun starts")
        if kind == "FullyShardedDataParallel":
            raise ValueError(f"{where}: {_FSDP1}")
