"""Which rank of a run evaluates what: its part of the batch, of the directions, of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

Dimensions = str | Sequence[str] | None
"""Names of dimensions of a mesh."""


@dataclass(frozen=True)
class Topology:
    """The ranks of a run, in the order in which losses are summed."""

    group: ProcessGroup
    names: tuple[int, ...]
    """Their global ranks, which messages name."""
    me: int
    """The place of this rank among them."""
    data: tuple[int, ...]
    """For each, which part of the batch it has."""
    query: tuple[int, ...]
    """For each, which part of a step's evaluations it has."""
    leads: tuple[bool, ...]
    """For each, whether it is the first of those that evaluate the same, whose losses count."""

    @property
    def queries(self) -> int:
        """Into how many parts a step's evaluations are divided."""
        return max(self.query) + 1

    def leader(self, rank: int) -> int:
        """The place of the first of those that evaluate the same as the one at this place."""
        pairs = zip(self.data, self.query, strict=True)
        return list(pairs).index((self.data[rank], self.query[rank]))


def topology_of(
    ranks: ProcessGroup | DeviceMesh | None,
    data: Dimensions,
    queries: Dimensions,
    model: Dimensions,
) -> Topology:
    """The roles of the ranks of a group or a mesh; see :func:`adamezo.distributed.connect`."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "torch.distributed has no process group: call "
            "`torch.distributed.init_process_group(backend, timeout=...)` first, in a process that "
            "torchrun has started"
        )
    if not isinstance(ranks, DeviceMesh):
        if (data, queries, model) != (None, None, None):
            raise ValueError(
                "data, queries and model name dimensions of a mesh, got "
                f"{type(ranks).__name__}: expected a DeviceMesh with `mesh_dim_names`"
            )
        group = _world() if ranks is None else ranks
        members = distributed.get_process_group_ranks(group)
        if distributed.get_rank() not in members:
            raise ValueError(f"this rank is none of the group's, which are {members}")
        count = len(members)
        me = members.index(distributed.get_rank())
        parts = tuple(range(count))
        return Topology(group, tuple(members), me, parts, (0,) * count, (True,) * count)
    roles = _roles(ranks, data, queries, model)
    members = ranks.mesh.flatten().tolist()
    if distributed.get_rank() not in members:
        raise ValueError(f"this rank is none of the mesh's, which are {members}")
    places = list(product(*map(range, ranks.mesh.shape)))
    parts = tuple(_number(at, ranks.mesh.shape, roles, "data") for at in places)
    query = tuple(_number(at, ranks.mesh.shape, roles, "queries") for at in places)
    leads = tuple(_number(at, ranks.mesh.shape, roles, "model") == 0 for at in places)
    me = members.index(distributed.get_rank())
    return Topology(_group_of(members), tuple(members), me, parts, query, leads)


def _roles(mesh: DeviceMesh, data: Dimensions, queries: Dimensions, model: Dimensions) -> list[str]:
    """The role of each dimension of a mesh."""
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and (data, queries, model) == (None, None, None):
        return ["data"]
    given: dict[str, str] = {}
    for role, some in (("data", data), ("queries", queries), ("model", model)):
        for name in [some] if isinstance(some, str) else some or ():
            if name not in names or name in given:
                raise ValueError(
                    f"{role}={name!r}, expected a dimension of the mesh that has no other role: "
                    f"it has {', '.join(names) or 'no names (mesh_dim_names)'}"
                )
            given[name] = role
    if len(given) != mesh.ndim:
        missing = [name for name in names if name not in given]
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions, of which {', '.join(missing) or 'some'} got no "
            "role: name each in data= (ranks with different parts of the batch, such as those of "
            "fully_shard), in queries= (that evaluate different directions) or in model= (that "
            "evaluate the same, such as those of tensor parallel)"
        )
    return [given[name] for name in names]


def _number(at: Sequence[int], sizes: Sequence[int], roles: Sequence[str], role: str) -> int:
    """A place among the dimensions of one role, counted row-major."""
    number = 0
    for i, size, of in zip(at, sizes, roles, strict=True):
        if of == role:
            number = number * size + i
    return number


def _world() -> ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None, "torch.distributed is initialized"
    return group


def _group_of(members: list[int]) -> ProcessGroup:
    if members == list(range(distributed.get_world_size())):
        return _world()
    return distributed.new_group(members, use_local_synchronization=True)


def device_of(group: ProcessGroup, weights: torch.device) -> torch.device:
    """Where tensors that a group exchanges have to be: on the host if it can, as losses are
    there."""
    config = distributed.distributed_c10d.get_backend_config(group)
    devices = [pair.partition(":")[0] for pair in config.split(",")]
    return torch.device("cpu") if "cpu" in devices or config == "gloo" else weights
