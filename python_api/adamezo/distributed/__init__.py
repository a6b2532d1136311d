"""Runs on several processes of torch.distributed, whose replicas stay equal bit for bit.

A direction is a function of the seed and of an element's place in its parameter. So ranks that
agree on a seed have the same directions, whatever piece of the weights each has, and exchange
nothing but losses: a few float64 numbers a step. docs/distributed.md has the use of it, and
docs/scaling.md what it costs. Each module uses the ones above it only:

    topology.py    which rank has which part of the batch, of the directions, of the model
    agreement.py   what has to be equal on all ranks: options, history, weights
    exchange.py    the exchange of a step
    connect.py     the beginning: checks, and what is refused
"""

from ..engine.ranks import RanksLost
from .connect import connect
from .exchange import Connected, RankFailed

__all__ = ["Connected", "RankFailed", "RanksLost", "connect"]
