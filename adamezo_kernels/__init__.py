"""Operations on many tensors at once along regenerated random directions.

This package turns tensors into kernel calls. It knows no optimizer: see :mod:`adamezo`.
"""

from .ops import moments, perturb_, sample_, update_, update_terms_
from .plan import Plan, Segment, Shard
from .stream import DISTRIBUTIONS, ROUNDINGS, STREAM_VERSION, PhiloxState
from .terms import RULES, Direction, Terms

__all__ = [
    "DISTRIBUTIONS",
    "ROUNDINGS",
    "RULES",
    "STREAM_VERSION",
    "Direction",
    "PhiloxState",
    "Plan",
    "Segment",
    "Shard",
    "Terms",
    "moments",
    "perturb_",
    "sample_",
    "update_",
    "update_terms_",
]
