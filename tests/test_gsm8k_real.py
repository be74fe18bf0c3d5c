"""configs/gsm8k.yaml on the real files, a byte-level BPE trained on them, a small random Qwen2 (`make slow`)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import train
from grpo.metrics import read_metrics
from tests.test_tasks_gsm8k import FOLDER as GSM8K
from tests.test_tasks_gsm8k import pytestmark as needs_gsm8k
from tests.tiny import tiny_qwen2

ROOT = Path(__file__).parents[1]


def save_model_with_bpe(folder: Path, lines: list[dict]) -> None:
    """A byte-level BPE of 8,192 tokens trained on questions and answers, and a random model of that vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((f"{line['question']}\n{line['answer']}" for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    settings = {"vocab_size": 8192, "max_position_embeddings": 2048, "eos_token_id": 0, "pad_token_id": 0}
    tiny_qwen2(hidden_size=64, intermediate_size=128, initializer_range=0.02, **settings).save_pretrained(folder)


# A random model never earns the task's own rewards, and equal rewards teach nothing: give it something to find.
OWN_TASK = """
from grpo.rewards import Reward
from grpo.tasks.gsm8k import Gsm8k

def letters(completions, **columns):
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in completions]

class WithLetters(Gsm8k):
    def __init__(self, data, rewards):
        super().__init__(data, rewards)
        self.rewards["letters"] = Reward(letters, 1.0)
"""


@pytest.mark.slow
@needs_gsm8k
def test_three_steps_on_the_real_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    save_model_with_bpe(tmp_path / "model", lines)
    (tmp_path / "own.py").write_text(OWN_TASK)
    options = ["--config", str(ROOT / "configs" / "gsm8k.yaml"), "--model.path=model", f"--data.path={GSM8K}"]
    options += ["--task=own.py:WithLetters", "--rewards.no-require-finish"]
    options += ["--num-steps=3", "--rollout.prompts-per-step=8", "--rollout.group-size=4", "--run-dir", "run"]
    options += ["--rollout.max-new-tokens=64", "--eval.validation-problems=8", "--eval.test-problems=8"]
    assert train.main(options) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert all(row["mismatch_max"] < 1e-4 for row in rows)
    completions = [json.loads(line) for line in (tmp_path / "run/completions/step_3.jsonl").read_text().splitlines()]
    assert len(completions) == 32 and all("<<" not in line["prompt"] for line in completions)
