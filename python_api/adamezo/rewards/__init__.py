"""Steps whose objective is a reward of generated text: a black box, without gradients.

Each module uses the ones above it only: ``shaping.py`` (ranks and z-scores of a step's rewards),
``text.py`` (rewards of what a transformers model generates).
"""

from .shaping import SHAPINGS, ranks, z_scores
from .text import TextReward

__all__ = ["SHAPINGS", "TextReward", "ranks", "z_scores"]
