"""How the evaluations of a step come to see perturbed weights: one module for each way.

- ``interface``: what a step asks of each.
- ``inplace``, with ``overflow``: writes the weights themselves.
- ``out_of_place``, with ``readers``, ``scratch`` and ``watch``: shows modules copies, and never
  writes the weights.
- ``regenerated``, with ``served`` and ``watch``: computes with perturbed weights where modules
  compute, and never writes or copies them.
- ``index``: the weights of a model by their modules and by their memory, for the last two.
"""

from .inplace import InPlace
from .interface import PERTURBATIONS, Perturbation, Point, perturbation_named
from .out_of_place import OutOfPlace
from .readers import Readers
from .regenerated import Corrected, Regenerated

__all__ = [
    "PERTURBATIONS",
    "Corrected",
    "InPlace",
    "OutOfPlace",
    "Perturbation",
    "Point",
    "Readers",
    "Regenerated",
    "perturbation_named",
]
