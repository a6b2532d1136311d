"""Operations on many tensors at once along regenerated random directions.

This package turns tensors into kernel calls. It knows no optimizer: see :mod:`adamezo`.
"""

from .call import Call
from .ops import moments, perturb_, run, sample_, update_, update_terms_
from .perturbed import perturbed_linear
from .plan import Plan, Segment, Shard
from .rules import RULES
from .stream import DISTRIBUTIONS, ROUNDINGS, STREAM_VERSION, PhiloxState, kind_of
from .terms import Direction, Terms

__all__ = [
    "DISTRIBUTIONS",
    "ROUNDINGS",
    "RULES",
    "STREAM_VERSION",
    "Call",
    "Direction",
    "PhiloxState",
    "Plan",
    "Segment",
    "Shard",
    "Terms",
    "kind_of",
    "moments",
    "perturb_",
    "perturbed_linear",
    "run",
    "sample_",
    "update_",
    "update_terms_",
]
