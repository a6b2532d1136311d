"""Adapters of all kinds: put into a model, trained, saved, merged and taken out in one way.

Each module uses the ones above it only:

    tensor_train.py  linear maps and residual adapters made of small cores
    targets.py       the modules that adapters are put on, by patterns of their names
    schemes.py       each kind of adapters: tensor trains here, LoRA and prefixes by integrations
    insertion.py     adapters in a model
    files.py         adapters in a folder
"""

from .files import load_adapters, save_adapters
from .insertion import adapt, adapters_of, merge, remove
from .schemes import SCHEMES
from .targets import FAMILIES
from .tensor_train import TensorTrainAdapter, TensorTrainLinear, factorise

__all__ = [
    "FAMILIES",
    "SCHEMES",
    "TensorTrainAdapter",
    "TensorTrainLinear",
    "adapt",
    "adapters_of",
    "factorise",
    "load_adapters",
    "merge",
    "remove",
    "save_adapters",
]
