"""Tiny random models of several families, a byte-level tokenizer, and slow oracles for rollout tests."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grpo.config import RolloutConfig
from grpo.records import Problem
from grpo.rollout import Sampler

VOCAB = 260  # 256 bytes, then <eos>, <pad> and two ids without text
EOS, PAD = 256, 257

FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral, window 12": ("mistral", {"sliding_window": 12}),
    "gemma2, window 8": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 5,  # a scale of its own
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "attn_implementation": "eager",  # what else some versions of transformers take leaves out the cap
            "tie_word_embeddings": False,  # tied, a random Gemma repeats its last token for ever
        },
    ),
    "gemma3, window 8": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 5,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "qwen3 moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gpt2": ("gpt2", {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
}


def tiny_model(family: str = "qwen2", seed: int = 0, **overrides) -> torch.nn.Module:
    """Two layers, width 32, fp32, weights wide enough that greedy text wanders."""
    model_type, extra = FAMILIES[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**sizes, **extra, **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that a stop string always crosses token borders."""
    vocab = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    assert (wrapped.eos_token_id, wrapped.pad_token_id) == (EOS, PAD)
    return wrapped


def syllable_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens of one or two letters: a stop string ends inside a token as often as at its end."""
    letters = "abcdefghijklmno"
    pieces = [*letters, *(a + b for a in letters for b in letters), *"pqrstuvwxyzABCDE"]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def problems(*lengths: int, first_index: int = 0) -> list[Problem]:
    """Random prompts of these lengths, each fixed by its index."""
    made = []
    for index, length in enumerate(lengths, first_index):
        ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1000 + index))
        made.append(Problem(id=f"p{index}", question="", answer="", index=index, prompt_ids=tuple(ids.tolist())))
    return made


def sampler(model: torch.nn.Module, **changes) -> Sampler:
    """A Sampler with small settings; `changes` go to RolloutConfig or to Sampler, whoever has the name."""
    rollout = dict(group_size=3, max_new_tokens=12, max_sequences=64, prefill_tokens=64)
    engine = dict(stop=(), seed=7, tokenizer=None)
    for name, value in changes.items():
        (rollout if name in RolloutConfig.__dataclass_fields__ else engine)[name] = value
    tokenizer = engine.pop("tokenizer") or byte_tokenizer()
    return Sampler(model, tokenizer, RolloutConfig(**rollout), **engine)


def ids_of(groups) -> list[list[list[int]]]:
    """The sampled ids, by group and sample."""
    return [[completion.ids for completion in group.completions] for group in groups]
