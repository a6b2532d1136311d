"""The functions that take perturbed weights in perturbation='regenerated'.

Modules are given stand-ins for their weights, tensors whose class torch asks before it runs a
function on them. A function that is in no table here is refused by the name of the weight.

- ``blocks``: the perturbations of one forward.
- ``matrices``: which functions of a perturbed matrix are served.
- ``low_rank``, ``full``, ``flipout``: how, for each kind of directions.
- ``vectors``: copies of vectors, one for each perturbation of a batch.
- ``dropout``: the same elements in all of them.
"""

from .blocks import Blocks, Kind
from .dropout import SharedDropout
from .flipout import Flipout
from .full import Full
from .low_rank import LowRank
from .matrices import StandIn
from .vectors import stacked

__all__ = [
    "Blocks",
    "Flipout",
    "Full",
    "Kind",
    "LowRank",
    "SharedDropout",
    "StandIn",
    "stacked",
]
