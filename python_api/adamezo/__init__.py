"""Fine-tune language models with forward passes only: Adam-style steps, no stored moments."""

from .closures import check_closure
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
    "check_closure",
    "fused_adamezo_step",
]
