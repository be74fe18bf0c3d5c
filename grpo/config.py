"""The config: frozen dataclasses, one per section. Their fields define the YAML files and the typed command line.

`load` reads YAML, `save` writes it. An unknown key is an error that names the nearest one. The docstring under a field
is its line in `--help`, and says where the value comes from if the field is None. A number, or each of a pair, must lie
in the interval beside its type. The command line is in grpo.command_line, further checks are in grpo.config_check.
Imports nothing else of this package.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Hub id or local folder of a causal language model. Empty: a small embedded model, built and trained at the start of the run (see `base`)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward pass. auto: bf16 on CUDA, but fp32 on CPU and on GPUs before Ampere (T4, V100), which have no bf16. Master weights, gradients and reductions are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    reference_offload: bool = False
    """Keep the weights of the frozen reference in CPU memory; they are copied to the device once per step, for its forward pass."""
    compile: bool | None = None
    """Run torch.compile on the layers, for training and decoding: fewer kernels for norm, rotary and MLP arithmetic (attention is left alone), at the cost of a minute or two at the start. None: on for CUDA GPUs from Ampere on, if there are a C compiler and Python's headers, and off with `deterministic`, gradient_checkpointing or distributed.strategy=fsdp."""


@dataclass(frozen=True)
class LoraConfig:
    rank: Annotated[int, "[0, inf)"] = 0
    """Rank of the low-rank adapters (LoRA, arXiv:2106.09685). Above 0 only they (and modules_to_save) are trained; 0: full fine-tuning."""
    alpha: Annotated[float, "(0, inf)"] = 16.0
    """The output of the adapters is scaled by alpha / rank."""
    dropout: Annotated[float, "[0, 1)"] = 0.0
    """Dropout on the inputs of the adapters, in passes with gradients only; above 0 it needs batch.layout=padded."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get adapters: each one whose dotted name ends in one of these."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained and saved in full, by the end of their name: norm stands for every norm layer."""
    quantize: Literal["none", "nf4"] = "none"
    """Quantization of the frozen weights under the adapters. nf4: 4.5 bits a weight (QLoRA, arXiv:2305.14314), with bitsandbytes (pip extra `quant`); embeddings, norms and head are not quantized."""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """Where the task's problems are: a folder with train and test files; one JSONL, JSON or Parquet file; a hub id; or one split of it (owner/name:train). From a single file or split, validation and test are held out. Empty: the task's default."""
    subset: str = ""
    """Subset (configuration) of a hub data set that has several."""
    level: Literal[1, 2, 3] = 1
    """Difficulty of task `word_problems`. 1: up to three steps with small numbers. 2: up to four steps, numbers up to 99. 3: two to six steps, numbers up to 99, and some numbers that are irrelevant."""
    prompt_column: str = "prompt"
    """Column that holds the question (task `jsonl`)."""
    answer_column: str = "answer"
    """Column that holds the reference answer (task `jsonl`)."""
    validation_fraction: Annotated[float, "(0, 1)"] = 0.1
    """Share of the training file held out for validation, drawn with `split_seed`; if there is only one file or split, the same share again is held out for test. Of the embedded rows of tasks `code` and `keywords` it is always a quarter each."""
    split_seed: int = 0
    """Seed of the train/validation split. Separate from `seed`, so that runs with different seeds share one split."""
    drop_overlong: bool = False
    """Leave out problems whose prompts leave no room for `rollout.max_new_tokens` in the model's context, and say how many. False: one such problem is an error before training starts."""
    curriculum: Literal["none", "drop_solved", "target_rate"] = "none"
    """Choose the training problems of each epoch by their rate, the share of correct completions at the last visit. drop_solved: leave out those with rate 1. target_rate: visit a problem the more often, the nearer its rate is to `target_rate`. Not for an endless split (task `word_problems`)."""
    target_rate: Annotated[float, "(0, 1)"] = 0.5
    """For curriculum target_rate: the preferred share of correct completions. At 0.5 rewards within a group differ most."""


@dataclass(frozen=True)
class PromptConfig:
    style: Literal["plain", "chat"] = "plain"
    """plain: text with few-shot exemplars, for base models. chat: the tokenizer's chat template, for instruct models."""
    shots: Annotated[int, "[0, 8]"] = 8
    """Worked exemplars before the question, 0 to 8."""
    exemplars: Literal["builtin", "train"] = "builtin"
    """builtin: the task's own eight (gsm8k and jsonl: short ones written for this project; other tasks with rows: the first of the training split). train: drawn from the training split with `exemplar_seed`, never the problem itself."""
    exemplar_seed: int = 0
    """Seed of the exemplars drawn from the training split."""
    template_options: tuple[str, ...] = ()
    """For style chat: further arguments of the template, each name=value with the value in JSON, such as enable_thinking=false for Qwen3."""


@dataclass(frozen=True)
class RewardsConfig:
    format_weight: Annotated[float, "[0, inf)"] = 0.5
    """Weight of the `format` component."""
    correctness_weight: Annotated[float, "[0, inf)"] = 1.0
    """Weight of the `correctness` component."""
    require_finish: bool = True
    """A completion truncated by the length limit earns 0 in every component, and never more than the worst finished one of its group. Without this, text that never ends can earn reward (observed: length rises to the limit, accuracy falls to 0)."""
    functions: tuple[str, ...] = ()
    """Further reward components: path/to/file.py:function or module:function, each `(completions, **columns) -> list of float or None` (None abstains); named after the function, weight 1 unless `weights` has another."""
    weights: tuple[str, ...] = ()
    """Weights of components, each component=number, such as parses=0.1; they override all others."""
    workers: Annotated[int, "[0, inf)"] = 0
    """Worker processes per rank that compute rewards; 0: this rank's share of the cores, at most 16."""
    timeout_s: Annotated[float, "(0, inf)"] = 5.0
    """Seconds that one call of a reward function may take. A longer one is killed, and its completions are tried one by one; one that times out alone is unscored."""
    step_timeout_s: Annotated[float, "(0, inf)"] = 600.0
    """Seconds that all scoring of a step may take on one rank; completions not scored by then are unscored. Must be below distributed.timeout_s, because the other ranks wait."""
    max_unscored: Annotated[float, "[0, 1]"] = 0.25
    """Share of a step's completions that may be unscored (error or timeout); more ends the run."""
    sandbox: Literal["auto", "bubblewrap", "namespaces", "unsafe_subprocess"] = "auto"
    """Where code written by the model runs (task `code`). auto: bubblewrap or else Linux namespaces, the first that stops every attack of a self-test; if neither does, the task is refused. unsafe_subprocess: only time and memory are limited, your files and network are in reach."""


@dataclass(frozen=True)
class RolloutConfig:
    prompts_per_step: Annotated[int, "[1, inf)"] = 16
    """Prompts per training step, over all ranks (P)."""
    group_size: Annotated[int, "[1, inf)"] = 8
    """Completions of each prompt (G)."""
    max_new_tokens: Annotated[int, "[1, inf)"] = 40
    """Maximum length of a completion, in tokens."""
    temperature: Annotated[float, "[0, inf)"] = 1.0
    """Divides the logits, in sampling and in the loss alike. Validation and test are always greedy."""
    top_p: Annotated[float, "(0, 1]"] = 1.0
    """Nucleus sampling. Training needs 1: the loss must use the same distribution as the sampler."""
    top_k: Annotated[int, "[0, inf)"] = 0
    """Keep the k most likely tokens; 0 keeps all. Training needs 0."""
    min_p: Annotated[float, "[0, 1]"] = 0.0
    """Drop tokens less likely than this share of the most likely one's probability; 0 keeps all. Training needs 0."""
    max_sequences: Annotated[int, "[1, inf)"] = 512
    """Maximum number of sequences decoded at a time on one rank; further ones wait their turn."""
    prefill_tokens: Annotated[int, "[1, inf)"] = 16384
    """Prompt tokens per prefill pass."""
    kv_gib: Annotated[float | None, "(0, inf)"] = None
    """Maximum size of the KV cache while sampling, in GiB; if it is too small for all sequences at once, they take turns. None: 30 % of the GPU's memory, or on CPU of this rank's share of the machine's or container's memory. Only as much as a rollout can use is allocated; on CUDA it is kept between rollouts if it takes at most 20 % of the memory."""
    cuda_graph: bool = True
    """Replay whole decode steps as CUDA graphs. If a model cannot be captured, a message says why and sampling continues without."""


@dataclass(frozen=True)
class ObjectiveConfig:
    preset: str = "grpo"
    """Row of the table PRESETS in grpo/objectives.py: grpo, dr_grpo, dapo, gspo, cispo, rloo or sapo. Every field below that is None takes its value from this row."""
    advantages: str | None = None
    """How rewards become advantages: group, group_mean, batch, rloo or per_reward."""
    surrogate: str | None = None
    """Per-token objective: clip, dual_clip, sequence, sequence_token, cispo, sapo, reinforce, or your own my_file.py:my_function."""
    aggregation: str | None = None
    """How token losses are averaged. sequence_mean: over each sequence, then over sequences. token_mean: over all tokens. constant: their sum is divided by the number of sequences times rollout.max_new_tokens."""
    clip_low: Annotated[float | None, "(0, 1]"] = None
    """The ratio is clipped at 1 - clip_low from below."""
    clip_high: Annotated[float | None, "(0, inf)"] = None
    """The ratio is clipped at 1 + clip_high from above; for cispo the weight is capped there."""
    ratio_cap: Annotated[float | None, "(1, inf)"] = None
    """For dual_clip: ratio above which a token with negative advantage has no gradient; above 1 + clip_high."""
    tau_positive: Annotated[float | None, "(0, inf)"] = None
    """For sapo: steepness of the gate for positive advantages."""
    tau_negative: Annotated[float | None, "(0, inf)"] = None
    """For sapo: steepness of the gate for all other advantages."""
    beta: Annotated[float | None, "[0, inf)"] = None
    """Coefficient of the KL to the reference model; with 0 none is loaded."""
    kl_estimator: str | None = None
    """Estimator of the KL: k1, k2 or k3. docs/objectives.md has the value and gradient of each."""
    kl_where: Literal["loss", "reward"] | None = None
    """loss: the KL is added to each token's loss. reward: its sum over the completion is subtracted from the reward, before advantages are computed (k1 only)."""
    kl_corrected: bool | None = None
    """Multiply the KL in the loss by the ratio, so that its gradient is that of KL(policy || reference) even off-policy."""
    ref_refresh_every: Annotated[int | None, "[0, inf)"] = None
    """Move the reference towards the policy every this many training steps; 0: never. In bf16 a moving reference has fp32 master weights of its own: 4 bytes a parameter."""
    ref_mix: Annotated[float | None, "(0, 1]"] = None
    """How far it moves: reference <- (1 - ref_mix) reference + ref_mix policy. 1: a copy of the policy; less: a moving average."""
    entropy_bonus: Annotated[float | None, "[0, inf)"] = None
    """Coefficient of an entropy bonus, to be maximised: the entropy of each token's whole distribution (not the sampled token's -log-prob), averaged like the surrogate."""
    entropy_share: Annotated[float | None, "(0, 1]"] = None
    """Share of an optimizer step's tokens, those of highest entropy, that contribute a gradient (arXiv:2506.01939 uses 0.2); 1: all. The loss is still divided by the number of all tokens."""
    mask_truncated: bool | None = None
    """Leave truncated completions out of the loss and its denominators; they still count in their group's mean and std."""
    mismatch: str | None = None
    """Correction for the difference between the sampler's log-probs and those of the training forward: none; token_truncate or sequence_truncate, importance weights of at most mismatch_cap; or sequence_mask, which masks sequences whose weight is outside 1/mismatch_cap to mismatch_cap."""
    mismatch_level: Literal["mean", "sum"] | None = None
    """Log-ratio of a sequence for `mismatch`. sum over tokens: unbiased as a weight, but rejects long completions more often. mean: biased as a weight, right for sequence_mask."""
    mismatch_cap: Annotated[float | None, "(1, inf)"] = None
    """Largest importance weight of `mismatch`; above 1."""
    dynamic_sampling: bool | None = None
    """Replace groups whose rewards are all equal: sample further prompts until prompts_per_step groups have unequal ones."""
    max_draws: Annotated[int | None, "[1, inf)"] = None
    """For dynamic_sampling: rollouts per step at most; after them, groups with equal rewards fill up the step."""
    overlong_share: Annotated[float | None, "[0, 1]"] = None
    """Last share of rollout.max_new_tokens over which a length penalty on the reward grows from 0 to 1; 0: no penalty."""


@dataclass(frozen=True)
class BatchConfig:
    layout: Literal["auto", "packed", "padded"] = "auto"
    """packed: whole groups in one row, each prompt computed once. padded: one row per sequence, each with its prompt. auto: packed, but padded for a model whose layers cannot share a prompt. Affects speed and memory only."""
    tokens_per_micro_batch: Annotated[int | None, "[1, inf)"] = None
    """Tokens per forward and backward pass on one rank, padding included. Affects speed and memory, never the gradient. None: 16,384 on CUDA; 4,096 on CPU, where larger ones do not fit into the cache."""
    minibatches: Annotated[int, "[1, inf)"] = 1
    """Optimizer steps per pass over a rollout, each on a contiguous block of prompts."""
    passes: Annotated[int, "[1, inf)"] = 1
    """Passes over each rollout (PPO epochs). If passes * minibatches > 1, the training model computes old log-probs in an additional forward pass."""


@dataclass(frozen=True)
class OptimConfig:
    lr: Annotated[float, "(0, inf)"] = 2e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or half a cosine that reaches 0 one step after the last."""
    warmup: Annotated[float, "[0, 1]"] = 0.1
    """Linear warm-up, as a fraction of num_steps."""
    betas: Annotated[tuple[float, float], "[0, 1)"] = (0.9, 0.99)
    """AdamW moment decays. 0.99 rather than 0.999: runs are short."""
    eps: Annotated[float, "(0, inf)"] = 1e-8
    """AdamW denominator offset."""
    weight_decay: Annotated[float, "[0, inf)"] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, "(0, inf)"] = 1.0
    """Gradients with a larger norm are scaled down to this one."""
    max_skipped_steps: Annotated[int, "[0, inf)"] = 3
    """Consecutive optimizer steps that may be skipped because loss or gradient is not finite; one more ends the run."""


@dataclass(frozen=True)
class EvalConfig:
    every: Annotated[int, "[0, inf)"] = 10
    """Validate every this many steps, and after the last; 0: never. The best checkpoint is the one of highest validation accuracy."""
    validation_problems: Annotated[int, "[1, inf)"] = 200
    """Problems per validation (greedy decoding)."""
    test_problems: Annotated[int, "[0, inf)"] = 200
    """Test problems, evaluated only before and after training (greedy decoding); 0: no test."""


@dataclass(frozen=True)
class DistributedConfig:
    strategy: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """What is sharded over ranks. ddp: nothing. zero1: fp32 master weights and Adam moments; gradients are bit-identical to ddp. fsdp: gradients, too, and the sampler's copy of the weights exists only while sampling (docs/scale.md). One rank keeps everything in any case."""
    timeout_s: Annotated[float, "(0, inf)"] = 1800.0
    """Seconds that ranks wait for each other; then the run ends with a message that names the ranks that did not respond."""
    term_grace_s: Annotated[float, "(0, inf)"] = 25.0
    """Seconds after SIGTERM that the current step may take to finish and save; then the process exits, with the last checkpoint to resume from. Keep it below the 30 after which torchrun kills."""


@dataclass(frozen=True)
class BaseConfig:
    """The embedded model and its supervised training; only used when model.path is empty."""

    hidden_size: Annotated[int, "[1, inf)"] = 128
    """Width of the model, a multiple of 2 * num_heads."""
    num_layers: Annotated[int, "[1, inf)"] = 2
    """Number of layers."""
    num_heads: Annotated[int, "[1, inf)"] = 4
    """Number of attention heads."""
    intermediate_size: Annotated[int, "[1, inf)"] = 256
    """Width of the MLP."""
    num_solutions: Annotated[int, "[0, inf)"] = 0
    """Number of worked solutions for supervised training, seen again in every epoch; 0: unlimited, a new one every time."""
    unseen_words: tuple[str, ...] = ()
    """Words kept out of supervised training, which sees no question that has one of them; GRPO does."""
    steps: Annotated[int, "[1, inf)"] = 350
    """Maximum number of optimizer steps on worked solutions."""
    stop_accuracy: float = 1.0
    """Stop this training early once validation accuracy (greedy decoding) reaches this."""
    batch_size: Annotated[int, "[1, inf)"] = 64
    """Solutions per optimizer step."""
    lr: Annotated[float, "(0, inf)"] = 3e-3
    """Peak learning rate of AdamW: linear warm-up over 20 steps, constant, then linear decay to 0."""
    decay: Annotated[float, "(0, 1]"] = 0.4
    """Share of the steps over which the learning rate decays. Of all these settings it improves accuracy the most."""
    answer_lines: Annotated[float, "[0, 1]"] = 1.0
    """Share of the supervised texts that end with the answer line; below 1, the format is left for GRPO to teach."""
    guess_share: Annotated[float, "[0, 1]"] = 0.0
    """Share of the supervised texts that answer without working ("I think 13."). Before a habit phase a few are needed: if its words are new to the model, that phase does harm."""
    habit_steps: Annotated[int, "[0, inf)"] = 0
    """Steps of a further phase, which teaches the bad habit of answering without working; 0: no such phase."""
    habit_share: Annotated[float, "[0, 1]"] = 0.7
    """Share of texts in the habit phase that answer without working."""
    habit_lr: Annotated[float, "(0, inf)"] = 5e-4
    """Peak learning rate of the habit phase, with the same schedule."""
    continue_lr: Annotated[float, "(0, inf)"] = 1e-3
    """Peak learning rate of the baseline that GRPO is compared with: supervised training continued on the same solutions, for as many seconds as GRPO took."""
    validate_every: Annotated[int, "[0, inf)"] = 50
    """Validate every this many supervised steps; 0: only at the end of a phase."""
    validation_problems: Annotated[int, "[1, inf)"] = 200
    """Problems per validation during supervised training (greedy decoding)."""


@dataclass(frozen=True)
class Config:
    """All settings of a run. Saved with every default filled in, as config.yaml in the run folder."""

    task: str = "word_problems"
    """word_problems (embedded), gsm8k, jsonl (any file with a prompt and an answer column), code (rows with tests) or keywords (rows with key terms), both with a small embedded set, or your own path/to/file.py:ClassName."""
    seed: Annotated[int, "[0, 4294967295]"] = 0
    """Seed of initialisation, problem order and every sampled token."""
    num_steps: Annotated[int, "[1, inf)"] = 50
    """Training steps: rollouts."""
    save_every: Annotated[int, "[1, inf)"] = 25
    """Save a checkpoint every this many steps; one is always saved at the end, and at a new best validation."""
    keep_last: Annotated[int, "[1, inf)"] = 2
    """Number of latest checkpoints to keep, besides the best one."""
    log_groups: Annotated[int | None, "[0, inf)"] = None
    """Write the completions of this many groups of each step, the first ones, to completions/; None: all. Long ones fill a disk: 1,024 completions of about 4,500 tokens are 30 MB per step."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the kernels. auto decides by device, dtype and shape, and reports what it chose."""
    deterministic: bool = False
    """On CUDA use bit-reproducible operations only, so that a resumed run repeats the lost steps exactly; slower. On CPU this is always so."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = None
    """Trackers that also get every metric of metrics.jsonl, and completions as tables if they support them: tensorboard, wandb, mlflow, trackio. None: tensorboard if it is installed."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    distributed: DistributedConfig = DistributedConfig()
    base: BaseConfig = BaseConfig()


CONFIGS = Path(__file__).parents[1] / "configs"
OTHER_NAMES = {  # other trainers' names: our keys
    "batch_size": "rollout.prompts_per_step",
    "bf16": "model.precision",
    "dataset_name": "data.path",
    "dtype": "model.precision",
    "epochs": "num_steps",
    "epsilon": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "eval_steps": "eval.every",
    "gradient_accumulation_steps": "batch.tokens_per_micro_batch",
    "kl_coef": "objective.beta",
    "learning_rate": "optim.lr",
    "lora_r": "lora.rank",
    "loss_type": "objective.preset",
    "max_completion_length": "rollout.max_new_tokens",
    "max_steps": "num_steps",
    "model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "n": "rollout.group_size",
    "num_generations": "rollout.group_size",
    "num_iterations": "batch.passes",
    "num_train_epochs": "num_steps",
    "per_device_train_batch_size": "rollout.prompts_per_step",
    "r": "lora.rank",
    "report_to": "track",
    "save_steps": "save_every",
    "scale_rewards": "objective.advantages",
    "steps_per_generation": "batch.minibatches",
    "torch_dtype": "model.precision",
    "wandb": "track",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
}


class UnknownKey(ValueError):
    """A key that this version of the config does not have."""


def from_dict(values: Any, section: type = Config, prefix: str = "") -> Any:
    """Nested plain values -> Config, or one `section` of it; missing keys keep their defaults.

    An integer may stand for a float and a list for a tuple. ValueError names the dotted key: an unknown one with the
    nearest known (UnknownKey), one of the wrong type with the value and the expected type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix[:-1] or 'config'}={values!r} is not a section; expected a mapping of keys to values")
    kinds = typing.get_type_hints(section)
    for name in values:
        if name not in kinds:
            known = [prefix + sibling for sibling in kinds] + known_keys()
            raise UnknownKey(f"unknown key {prefix}{name}{nearest(f'{prefix}{name}', known)}")
    return section(**{name: _convert(kinds[name], value, prefix + name) for name, value in values.items()})


class _Loader(yaml.SafeLoader):
    """YAML in which a duplicate key is an error; PyYAML would silently drop its first value."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: duplicate key {key.value}; keep one")
            seen.add(key.value)
        return node


def load(path: Path | str) -> Config:
    """The config in a YAML file. ValueError names the file."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        return from_dict({} if values is None else values)
    except OSError as error:
        shipped = sorted(f"configs/{path.name}" for path in CONFIGS.glob("*.yaml"))
        raise ValueError(f"cannot read config {path}: {error.strerror}; there are: {', '.join(shipped)}") from error
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path}: line {error.problem_mark.line + 1}: {error.problem}") from error
    except (ValueError, yaml.YAMLError) as error:
        is_of_a_run = isinstance(error, UnknownKey) and Path(path).name == "config.yaml"
        remedy = "; if another version wrote it, remove the line" if is_of_a_run else ""
        raise ValueError(f"{path}: {str(error).splitlines()[0]}{remedy}") from error


def dump(config: Config) -> str:
    """Every field as YAML, defaults included; `load` reads it back unchanged."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def save(config: Config, path: Path | str) -> None:
    """Write `dump(config)` to a file, whole or not at all: runs resume from it."""
    unfinished = Path(path).with_suffix(".tmp")
    unfinished.write_text(dump(config), encoding="utf-8")
    unfinished.replace(path)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key, in the order of the fields: task, ..., model.path, ..."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def known_keys() -> list[str]:
    """Every dotted key of the config."""
    return list(flat(asdict(Config())))


def nearest(key: str, known: Collection[str], spell: Callable[[str], str] = str) -> str:
    """`; the nearest is KEY` for an error message, or "". KEY is ours for another trainer's name (OTHER_NAMES), else the
    known key whose last part is spelled most alike, preferably in the same section."""
    section, _, name = key.rpartition(".")
    last = lambda candidate: candidate.rpartition(".")[2]
    spelling = difflib.get_close_matches(name, map(last, known), n=1)
    ours = OTHER_NAMES.get(name)
    alike = [ours] if ours in known else [each for each in known if [last(each)] == spelling]
    alike.sort(key=lambda each: each.rpartition(".")[0] != section)
    return f"; the nearest is {spell(alike[0])}" if alike else ""


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type of its field, or ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return from_dict(value, kind, key + ".")
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(arguments[0], value, key)  # X | None is the only union in use
    if origin is tuple and isinstance(value, list | tuple):
        of_any_length = arguments[-1] is Ellipsis
        kinds = [arguments[0]] * len(value) if of_any_length else arguments
        if len(kinds) == len(value):
            return tuple(_convert(part, item, key) for part, item in zip(kinds, value, strict=True))
    if origin is Literal and value in arguments and not isinstance(value, bool):
        return value
    if kind is float and type(value) in (int, float, str):  # str: YAML 1.1 reads 1e-6, without a point, as text
        with suppress(ValueError):
            return float(value)
    if type(value) is kind:  # exactly: True is not an int
        return value
    expected = f"one of {', '.join(map(repr, arguments))}" if origin is Literal else getattr(kind, "__name__", kind)
    if origin is tuple:
        expected = "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
    raise ValueError(f"{key}={value!r} is {type(value).__name__}; expected {expected}")
