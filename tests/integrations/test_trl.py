"""trl's SFTTrainer with forward-only steps."""

from __future__ import annotations

import pytest
import torch

from adamezo.integrations import ZOTrainerMixin
from adamezo.runlog import StepLog, read
from helpers import families
from helpers.trainers import arguments, same, weights

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")


class ZOSFTTrainer(ZOTrainerMixin, trl.SFTTrainer):
    pass


def make(folder, **changed):
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(4, families.VOCABULARY, (6 + i % 3,), generator=generator)}
        for i in range(16)
    ]
    data = datasets.Dataset.from_list([{"input_ids": r["input_ids"].tolist()} for r in rows])
    args = arguments(
        folder, trl.SFTConfig, logging_steps=1, bf16=False, activation_checkpointing=False,
        **{"max_steps": 4, **changed},
    )  # fmt: skip
    return ZOSFTTrainer(
        families.make("llama"), args, train_dataset=data, eval_dataset=data.select(range(4)),
        processing_class=tokenizer(), step_log=StepLog,
    )  # fmt: skip


def tokenizer():
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<unk>": 0, "<pad>": 1, "<eos>": 2}
    words |= {f"w{i}": i for i in range(3, families.VOCABULARY)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>", pad_token="<pad>", eos_token="<eos>",
    )  # fmt: skip


def test_it_trains_resumes_and_logs_what_trl_logs(tmp_path):
    settings = dict(save_strategy="steps", save_steps=2)
    whole = make(tmp_path, **settings)
    start = weights(whole.model)
    whole.train()
    assert not same(start, weights(whole.model))
    first = whole.state.log_history[0]
    assert {"loss", "projected_grad", "mean_token_accuracy", "forward_passes"} <= first.keys()
    assert not any(name.startswith("eval_") for name in first)
    assert read(tmp_path / "checkpoint-4" / "steps.log").steps == 4
    resumed = make(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(resumed.model))
    # What trl counts in training stays out of an evaluation.
    assert "eval_mean_token_accuracy" in whole.evaluate()
