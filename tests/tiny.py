"""Small random models and made-up groups that several tests share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from grpo.config import LoraConfig
from grpo.lora import LoraLinear, add_adapters
from grpo.records import Completion, Group, Problem

VOCABULARY = 61


def tiny_qwen2(seed: int = 0, **changes: object) -> Qwen2ForCausalLM:
    """Two layers, grouped-query attention, tied embeddings: everything that the real model has, small."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.2,
        "attn_implementation": "sdpa",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**{**settings, **changes}))


def adapted(model: PreTrainedModel, **changes: object) -> PreTrainedModel:
    """The same model with adapters of rank 4 that already do something."""
    add_adapters(model, LoraConfig(**{"rank": 4, "alpha": 8.0, **changes}))
    generator = torch.Generator().manual_seed(9)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_B.data.copy_(torch.empty(module.lora_B.shape).normal_(0, 0.1, generator=generator))
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w2 .. w60 by space; 0 is padding, 1 is EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def use_fp64_rms_norm(monkeypatch=None) -> None:
    """transformers computes RMSNorm in fp32 even in an fp64 model; make it keep the dtype."""

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    if monkeypatch is None:
        modeling_qwen2.Qwen2RMSNorm.forward = forward
    else:
        monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", forward)


def made_up_groups(num_groups: int = 8, group_size: int = 4, seed: int = 0) -> list[Group]:
    """Ragged prompts (1 to 9 tokens) and completions (1 to 12 tokens) with plausible sampler log-probs."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, size=(): torch.randint(low, high, size, generator=generator)
    groups = []
    for index in range(num_groups):
        prompt = tuple(draw(2, VOCABULARY, (int(draw(1, 10)),)).tolist())
        completions = []
        for sample in range(group_size):
            ids = draw(2, VOCABULARY, (int(draw(1, 13)),)).tolist()
            logprobs = (-3 * torch.rand(len(ids), generator=generator)).tolist()
            completions.append(Completion(ids=ids, logprobs=logprobs, text="", finish="eos", sample=sample))
        problem = Problem(id=str(index), question="", answer="", index=index, prompt_ids=prompt)
        groups.append(Group(problem=problem, completions=completions, step=0))
    return groups


def write_gsm8k_files(folder: Path, num_train: int = 20, num_test: int = 4) -> None:
    """train.jsonl and test.jsonl with questions of our own in the layout of the GSM8K files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", num_train), ("test", num_test)):
        lines = []
        for i in range(count):
            question = f"Ida packs {i + 3} boxes with 7 pears each on {name} day. How many pears does she pack?"
            total = 7 * (i + 3)
            answer = f"She packs {i + 3}*7 = <<{i + 3}*7={total}>>{total} pears.\n#### {total}"
            lines.append(json.dumps({"question": question, "answer": answer}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def save_tiny_model(folder: Path, *, context: int, **changes: object) -> None:
    """A random Qwen2 with a byte-level tokenizer, in Hugging Face layout. changes: to its config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    settings = {"vocab_size": len(vocabulary), "max_position_embeddings": context, "eos_token_id": 0, "pad_token_id": 0}
    tiny_qwen2(**settings | changes).save_pretrained(folder)
