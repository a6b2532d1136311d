"""Fine-tune a causal language model on a CSV file of labelled texts, with forward passes only.

Each module uses the ones above it only: ``options.py`` (everything that decides a run), ``data.py``
(examples and batches), ``task.py`` (loss and scores of a model), ``report.py`` (results as numbers,
text and curves), ``run.py`` (the run itself).
"""

from .data import Example, batches, read_examples, split
from .options import Options
from .run import finetune
from .task import Evaluation, Task

__all__ = [
    "Evaluation",
    "Example",
    "Options",
    "Task",
    "batches",
    "finetune",
    "read_examples",
    "split",
]
