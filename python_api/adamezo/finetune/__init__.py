"""Fine-tune a causal language model on a file of examples, with forward passes only.

Each module uses the ones above it only:

    options.py     everything that decides a run
    table.py       files and folders as rows
    data.py        labelled texts, splits and batches
    tasks          a file for each kind of task: from rows to a loss and its measurements
    optimizer.py   the optimizer that the options describe
    checkpoint.py  weights and optimizer at a place in a log
    measure.py     time and memory
    needs.py       the memory of a step, computed from a model's config
    report.py      results as numbers, text and curves
    run.py         the run itself
"""

from .data import Example, batches, read_examples, split
from .options import Options
from .run import Stopped, finetune
from .table import Table, read_table
from .tasks import TASKS, Classification, Evaluation, Task

__all__ = [
    "TASKS",
    "Classification",
    "Evaluation",
    "Example",
    "Options",
    "Stopped",
    "Table",
    "Task",
    "batches",
    "finetune",
    "read_examples",
    "read_table",
    "split",
]
