"""Fine-tune language models with forward passes only: Adam-style steps, no stored moments."""

from importlib import metadata as _metadata

from .engine.batched import PerturbedBatch, batched
from .engine.check_closure import check_closure
from .engine.closure import LossSum
from .engine.find_lr import FoundLr, find_lr
from .fused_step import forget_optimizer, fused_adamezo_step, optimizer_of
from .methods import (
    FZOO,
    GRZO,
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

try:
    __version__ = _metadata.version("adamezo")
except _metadata.PackageNotFoundError:  # run from the sources, as on a machine without network
    __version__ = "0+not.installed"

__all__ = [
    "FZOO",
    "GRZO",
    "HELENE",
    "MEAZO",
    "AdaMeZO",
    "AdaZeta",
    "FoundLr",
    "HiZOO",
    "LossSum",
    "MeZO",
    "PerturbedBatch",
    "ScalarAdaMeZO",
    "ZOAdaMU",
    "ZOAdam",
    "__version__",
    "batched",
    "check_closure",
    "find_lr",
    "forget_optimizer",
    "fused_adamezo_step",
    "optimizer_of",
]
