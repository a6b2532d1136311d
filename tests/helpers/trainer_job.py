"""A script with a ZOTrainer, for torchrun and ``accelerate launch``: ``trainer_job.py FOLDER``."""

from __future__ import annotations

import sys
import warnings

from adamezo.runlog import StepLog
from helpers.trainers import trainer

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    made = trainer(sys.argv[1], step_log=StepLog, max_steps=6, gradient_accumulation_steps=1)
    made.train()
    made.save_model()
