"""Fine-tune language models with forward passes only: Adam-style steps, no stored moments."""

from .methods import (
    FZOO,
    HELENE,
    MEAZO,
    AdaMeZO,
    AdaZeta,
    HiZOO,
    MeZO,
    ScalarAdaMeZO,
    ZOAdam,
    ZOAdaMU,
)
from .step import fused_adamezo_step

__all__ = [
    "FZOO",
    "HELENE",
    "MEAZO",
    "AdaMeZO",
    "AdaZeta",
    "HiZOO",
    "MeZO",
    "ScalarAdaMeZO",
    "ZOAdaMU",
    "ZOAdam",
    "fused_adamezo_step",
]
