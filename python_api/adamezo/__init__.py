"""Fine-tune language models with forward passes only: Adam-style steps, no stored moments."""

from .methods import FZOO, MEAZO, AdaMeZO, AdaZeta, MeZO, ScalarAdaMeZO
from .step import fused_adamezo_step

__all__ = [
    "FZOO",
    "MEAZO",
    "AdaMeZO",
    "AdaZeta",
    "MeZO",
    "ScalarAdaMeZO",
    "fused_adamezo_step",
]
