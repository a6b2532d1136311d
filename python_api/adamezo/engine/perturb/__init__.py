"""How the evaluations of a step come to see perturbed weights: one module for each way.

- ``interface``: what a step asks of each.
- ``inplace``, with ``overflow``: writes the weights themselves.
- ``out_of_place``, with ``readers``, ``scratch`` and ``watch``: shows modules copies, and never
  writes the weights.
"""

from .inplace import InPlace
from .interface import PERTURBATIONS, Perturbation, perturbation_named
from .out_of_place import OutOfPlace
from .readers import Readers

__all__ = [
    "PERTURBATIONS",
    "InPlace",
    "OutOfPlace",
    "Perturbation",
    "Readers",
    "perturbation_named",
]
