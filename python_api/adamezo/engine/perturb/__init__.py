"""How the evaluations of a step come to see perturbed weights: one module for each way.

- ``interface``: what a step asks of each.
- ``inplace``, with ``overflow``: writes the weights themselves.
- ``out_of_place``, with ``readers``, ``scratch`` and ``watch``: shows modules copies, and never
  writes the weights.
- ``saved``: the same for weights in pieces, which are written, and restored from a copy.
- ``regenerated``, with ``served`` and ``watch``: computes with perturbed weights where modules
  compute, and never writes or copies them.
- ``index``: the weights of a model by their modules and by their memory, for all but ``inplace``
  and ``saved``.
"""

from .inplace import InPlace
from .interface import PERTURBATIONS, Perturbation, Point, perturbation_named
from .out_of_place import OutOfPlace
from .readers import Readers
from .regenerated import Corrected, Regenerated
from .saved import Saved

__all__ = [
    "PERTURBATIONS",
    "Corrected",
    "InPlace",
    "OutOfPlace",
    "Perturbation",
    "Point",
    "Readers",
    "Regenerated",
    "Saved",
    "perturbation_named",
]
