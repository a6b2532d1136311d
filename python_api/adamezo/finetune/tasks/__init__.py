"""The kinds of tasks, one file each: a table of data, the loss of a closure, what is measured.

Another kind is a file like these, and a line of TASKS. ``choices.py`` scores answers that are
texts, ``generative.py`` has what tasks with a loss of tokens share.
"""

from .base import Evaluation, Task
from .classification import Classification
from .instruct import Instruct
from .lm import LanguageModelling
from .multiple_choice import MultipleChoice

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "lm": LanguageModelling,
    "instruct": Instruct,
    "multiple-choice": MultipleChoice,
}

__all__ = [
    "TASKS",
    "Classification",
    "Evaluation",
    "Instruct",
    "LanguageModelling",
    "MultipleChoice",
    "Task",
]
