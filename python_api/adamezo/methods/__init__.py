"""The methods, one file each: where a rule evaluates the loss, and what it does with that."""

from .adamezo import AdaMeZO
from .adazeta import AdaZeta
from .fzoo import FZOO
from .meazo import MEAZO
from .mezo import MeZO
from .scalar_adamezo import ScalarAdaMeZO

__all__ = ["FZOO", "MEAZO", "AdaMeZO", "AdaZeta", "MeZO", "ScalarAdaMeZO"]
