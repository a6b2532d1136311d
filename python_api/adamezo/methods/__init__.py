"""The methods, one file each: where a rule evaluates the loss, and what it does with that."""

from .adamezo import AdaMeZO
from .adazeta import AdaZeta
from .fzoo import FZOO
from .grzo import GRZO
from .helene import HELENE
from .hizoo import HiZOO
from .meazo import MEAZO
from .mezo import MeZO
from .scalar_adamezo import ScalarAdaMeZO
from .zo_adam import ZOAdam
from .zo_adamu import ZOAdaMU

__all__ = [
    "FZOO",
    "GRZO",
    "HELENE",
    "MEAZO",
    "AdaMeZO",
    "AdaZeta",
    "HiZOO",
    "MeZO",
    "ScalarAdaMeZO",
    "ZOAdaMU",
    "ZOAdam",
]
