"""What `--dry-run` prints: the resolved config, the effective batch and an estimate of the memory. Loads no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from grpo.base import model_config
from grpo.config import Config, dump
from grpo.layers import decoder_layers
from grpo.lora import LoraLinear, Nf4, add_adapters
from grpo.policy import choose_precision, load_model_config
from grpo.rollout.slab import GIB, kv_budget
from grpo.tasks.word_problems import LEVELS
from kernels.linear_logprob.modes import rows_per_chunk

QUESTION_TOKENS, EXEMPLAR_TOKENS = 110, 85  # GSM8K, Qwen2.5's tokenizer: plain 86 + 84 a shot, chat 112 + 89
EMBEDDED_VOCABULARY = 400


@dataclass(frozen=True)
class ModelFacts:
    """What the dry run's memory estimate needs to know of a model."""

    num_parameters: int
    num_trained: int  # fewer under LoRA
    num_in_4_bits: int  # of the frozen parameters
    num_in_layers: int  # the rest: embeddings, last norm and head
    shape: PretrainedConfig  # layers, heads, widths, vocabulary
    bytes_per_element: int  # of the forward pass: 2 in bf16, 4 in fp32
    has_reference: bool  # beta > 0
    prompt_tokens: int  # length assumed of a prompt
    logit_chunk_tokens: int  # tokens whose logits the head holds at a time
    kv_budget: float = math.inf  # bytes that the KV cache may take while sampling; inf: unknown

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        shape = self.shape
        kv_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        return 2 * shape.num_hidden_layers * kv_heads * head_dim * self.bytes_per_element


def model_facts(config: Config, device: torch.device) -> ModelFacts:
    """Sizes of the configured model, from its config alone (parameters are counted on the meta device)."""
    path = config.model.path
    shape = load_model_config(path) if path else model_config(config.base, vocab_size=EMBEDDED_VOCABULARY)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(shape)
    if config.lora.rank:
        add_adapters(whole, replace(config.lora, quantize="none"))
    parameters = list(whole.parameters())
    adapted = [layer.weight for layer in whole.modules() if isinstance(layer, LoraLinear)]
    question, exemplar = QUESTION_TOKENS, EXEMPLAR_TOKENS
    if config.task == "word_problems":
        level = LEVELS[config.data.level]
        question, exemplar = level.prompt_tokens, level.prompt_tokens + level.solution_tokens // 2
    is_bf16 = choose_precision(config.model.precision, device) == "bf16"
    return ModelFacts(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        num_in_4_bits=sum(weight.numel() for weight in adapted if config.lora.quantize == "nf4"),
        num_in_layers=sum(parameter.numel() for layer in decoder_layers(whole) for parameter in layer.parameters()),
        shape=shape,
        bytes_per_element=2 if is_bf16 else 4,
        has_reference=bool(config.objective.beta),
        prompt_tokens=question + exemplar * config.prompt.shots,
        logit_chunk_tokens=rows_per_chunk(shape.vocab_size, device.type),
        kv_budget=_kv_budget(config, device, is_bf16),
    )


def _kv_budget(config: Config, device: torch.device, is_bf16: bool) -> float:
    """The sampler's budget; inf without kv_gib on a CPU in bf16, where the user is asking about a GPU elsewhere."""
    kv_gib = config.rollout.kv_gib
    is_here = torch.cuda.is_available() if device.type == "cuda" else not is_bf16
    return math.inf if kv_gib is None and not is_here else kv_budget(kv_gib, device)


def dry_run_report(config: Config, world_size: int, model: ModelFacts) -> str:
    """The resolved config, the effective batch and the estimated memory per rank, as text for the terminal."""
    memory = memory_estimate(config, world_size, model)
    lines = [dump(config), *_effective_batch(config, world_size, model), "", "memory per rank, estimated, GiB"]
    lines += [f"  {name:<34}{size / 2**30:>10.3f}" for name, size in memory.items()]
    lines += [f"  {'total':<34}{sum(memory.values()) / 2**30:>10.3f}", "", *_by_strategy(config, model)]
    return "\n".join(lines)


def _by_strategy(config: Config, model: ModelFacts, ranks: tuple[int, ...] = (1, 8)) -> list[str]:
    """The total on 1 and 8 ranks under each `distributed.strategy`, as a table."""
    lines = ["total by distributed.strategy      " + "".join(f"{size:>7} rank{'s'[: size > 1]}" for size in ranks)]
    for strategy in ("ddp", "zero1", "fsdp"):
        asked = replace(config, distributed=replace(config.distributed, strategy=strategy))
        totals = [sum(memory_estimate(asked, size, model).values()) / 2**30 for size in ranks]
        lines.append(f"  {strategy:<34}" + "".join(f"{total:>12.1f}" for total in totals))
    return lines


def _effective_batch(config: Config, world_size: int, model: ModelFacts) -> list[str]:
    rollout, batch = config.rollout, config.batch
    longest = model.prompt_tokens + rollout.max_new_tokens
    lines = [f"effective batch (upper bounds; prompts taken as {model.prompt_tokens} tokens)"]
    for name, share in (("per step", 1), ("per rank", world_size)):
        prompts = rollout.prompts_per_step // share
        completions = prompts * rollout.group_size
        lines.append(
            f"  {name}: {prompts} prompts x {rollout.group_size} = {completions} completions; "
            f"{completions * rollout.max_new_tokens:,} tokens sampled, "
            f"{completions * longest:,} trained on with prompts"
        )
    sequences = rollout.prompts_per_step * rollout.group_size // world_size
    there_is = "as much as there is" if model.kv_budget == math.inf else f"{model.kv_budget / GIB:.3g}"
    lines.append(
        f"  decoded at a time, per rank: {_decoded_together(config, world_size, model)} of {sequences}, each with "
        f"{model.token_bytes * longest / GIB:.2g} GiB for keys and values, of {there_is} (rollout.kv_gib)"
    )
    lines.append(f"  optimizer steps per training step: {batch.passes} passes x {batch.minibatches} minibatches")
    lines.append(
        f"  micro-batches per optimizer step and rank: {_micro_batches(config, world_size, model)} of at most "
        f"{_tokens_of_a_pass(config, model):,} tokens, {'padded' if batch.layout == 'padded' else 'packed'}"
    )
    return lines


def _decoded_together(config: Config, world_size: int, model: ModelFacts) -> int:
    """Sequences that a rank decodes at a time: the least of all, max_sequences and what fits at full length."""
    rollout = config.rollout
    each = model.token_bytes * (rollout.max_new_tokens + model.prompt_tokens / rollout.group_size)
    sequences = rollout.prompts_per_step * rollout.group_size // world_size
    return int(min(sequences, rollout.max_sequences, model.kv_budget // each))


def _tokens_of_a_pass(config: Config, model: ModelFacts) -> int:
    """Most tokens in a micro-batch: the budget or, if that is more, one sequence without its last token."""
    longest = model.prompt_tokens + config.rollout.max_new_tokens - 1
    return max(config.batch.tokens_per_micro_batch, longest)


def _micro_batches(config: Config, world_size: int, model: ModelFacts) -> int:
    """Micro-batches if every completion has full length; auto is taken as packed, as it is for all but a few models."""
    rollout, batch = config.rollout, config.batch
    groups = rollout.prompts_per_step // (world_size * batch.minibatches)
    prompt, new, budget = model.prompt_tokens, rollout.max_new_tokens, batch.tokens_per_micro_batch
    if batch.layout == "padded":
        return math.ceil(groups * rollout.group_size / max(1, budget // (prompt + new)))
    whole_groups = budget // (prompt + rollout.group_size * new)
    if whole_groups:
        return math.ceil(groups / whole_groups)
    return groups * math.ceil(rollout.group_size / max(1, (budget - prompt) // new))


def memory_estimate(config: Config, world_size: int, model: ModelFacts) -> dict[str, int]:
    """Bytes of one rank by purpose. Summed as if all were allocated at once, so the total is an upper estimate; of two
    parts that never exist together only the larger counts.

    Activations kept for the backward pass, per token and layer: 8 tensors as wide as the model and 4 as wide as the
    MLP (SwiGLU); with checkpointing only the layer's input, plus one layer in full.
    """
    rollout, shape, size = config.rollout, model.shape, model.bytes_per_element
    sequences = _decoded_together(config, world_size, model)
    groups = math.ceil(sequences / rollout.group_size)
    cached_tokens = groups * model.prompt_tokens + sequences * rollout.max_new_tokens
    mlp_width = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size  # GPT-2, OPT: another name
    layer = (8 * shape.hidden_size + 4 * mlp_width) * size
    checkpointed = shape.num_hidden_layers * shape.hidden_size * size + layer
    activation = checkpointed if config.model.gradient_checkpointing else shape.num_hidden_layers * layer
    copies, temporary = weights_estimate(config, world_size, model)
    update = {"activations of a micro-batch": activation * _tokens_of_a_pass(config, model)}
    if temporary:
        update = {f"activations, or {' or '.join(temporary)}": max(*update.values(), *temporary.values())}
    return copies | {
        "KV cache": model.token_bytes * cached_tokens,
        **update,
        "logits of a chunk": 4 * shape.vocab_size * model.logit_chunk_tokens,
        "logits of a decoding step": 2 * 4 * shape.vocab_size * sequences,
    }


def weights_estimate(config: Config, world_size: int, model: ModelFacts) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of one rank for weights, gradients and moments: (what stays, what is freed while activations exist).

    Of what is sharded over ranks (grpo.sharding), one rank's share, assuming even shards.
    """
    size, trained, strategy = model.bytes_per_element, model.num_trained, config.distributed.strategy
    if world_size == 1:
        strategy = "ddp"
    share = lambda num, *strategies: math.ceil(num / (world_size if strategy in strategies else 1))
    is_copied = size < 4 or strategy == "fsdp"
    permanent, temporary = {}, {}
    permanent["fp32 masters"] = 4 * share(trained, *(("zero1", "fsdp") if is_copied else ()))
    permanent["gradients, fp32"] = 4 * share(trained, "fsdp")
    permanent["Adam moments, fp32"] = 8 * share(trained, "zero1", "fsdp")
    if trained < model.num_parameters:
        not_quantized = model.num_parameters - trained - model.num_in_4_bits
        permanent["frozen base"] = size * not_quantized + int(Nf4.BYTES_PER_WEIGHT * model.num_in_4_bits)
    if is_copied:
        (temporary if strategy == "fsdp" else permanent)["working copy" + ", bf16" * (size < 4)] = size * trained
    if strategy == "fsdp":  # all outside the layers, and two layers at a time, with gradients
        outside = model.num_parameters - model.num_in_layers
        two_layers = 2 * model.num_in_layers // model.shape.num_hidden_layers
        permanent["gathered weights and gradients"] = 2 * size * (outside + two_layers)
    if model.has_reference:  # under LoRA it shares the frozen base
        (temporary if config.model.reference_offload else permanent)["frozen reference"] = size * trained
    if config.objective.ref_refresh_every and size < 4:
        permanent["masters of the reference, fp32"] = 4 * share(trained, "zero1", "fsdp")
    return permanent, temporary
