"""Frozen dataclasses, one per room. YAML files and the typed command line both come from these fields.

Imports nothing of ours. `load` reads YAML, `save` writes it. An unknown key is an error that names the nearest one; the
docstring under a field is its line in `--help`. A field that is None takes its value from somewhere stated in its
docstring; a number must lie in the interval beside its type, each item of a pair, too. The command line is in
grpo.command_line, what else is refused in grpo.config_check.
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
    """Hub id or local folder of a causal language model. Empty: the small embedded model, built and trained on the spot (see `base`)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Forward precision. auto: bf16 on CUDA, fp32 on CPU and on GPUs before Ampere (T4, V100), which have no bf16. Masters, gradients and reductions are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    reference_offload: bool = False
    """Keep the weights of the frozen reference in CPU memory; they come to the device for its pass alone, once a step."""
    compile: bool | None = None
    """torch.compile the layers, in training and while decoding: norm, rotary and MLP arithmetic in fewer kernels, attention left alone; a minute or two at the start. None: on CUDA, but not with `deterministic`, gradient_checkpointing or distributed.strategy=fsdp, nor on a GPU before Ampere, nor without a C compiler and Python's headers."""


@dataclass(frozen=True)
class LoraConfig:
    rank: Annotated[int, "[0, inf)"] = 0
    """Rank of low-rank adapters (LoRA, arXiv:2106.09685), which are then all that is trained; 0: full fine-tuning."""
    alpha: Annotated[float, "(0, inf)"] = 16.0
    """What the adapters add is scaled by alpha / rank."""
    dropout: Annotated[float, "[0, 1)"] = 0.0
    """Dropout of what the adapters read, in the passes that form gradients; above 0 needs batch.layout=padded."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get adapters, by the end of their dotted name."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained and saved whole, by the end of their name: norm is every norm layer."""
    quantize: Literal["none", "nf4"] = "none"
    """Frozen weights of the layers with adapters. nf4: 4.5 bits each (QLoRA, arXiv:2305.14314), by bitsandbytes (extra `quant`); embeddings, norms and head stay as they are."""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """Where the task's problems are: a folder with train/test files, one JSONL, JSON or Parquet file, a hub id, or one split of it (owner/name:train). Of one file or split, validation and test are held out. Empty: the task's own default."""
    subset: str = ""
    """Which subset (configuration) of a hub data set, where it has several."""
    level: Literal[1, 2, 3] = 1
    """How hard the problems of task `word_problems` are. 1: up to three steps with small numbers. 2: up to four, numbers to 99. 3: two to six, numbers to 99, and numbers that do not matter."""
    prompt_column: str = "prompt"
    """Column that holds the question (task `jsonl`)."""
    answer_column: str = "answer"
    """Column that holds the reference answer (task `jsonl`)."""
    validation_fraction: Annotated[float, "(0, 1)"] = 0.1
    """Share of the training file held out for validation, drawn with `split_seed`; where there is only one file or split, as much again is held out for test. The embedded rows of tasks `code` and `keywords` have a quarter for each."""
    split_seed: int = 0
    """Seed of the train/validation split. Apart from `seed`, so that runs with different seeds share one split."""
    drop_overlong: bool = False
    """Leave out problems whose prompts leave no room for `rollout.max_new_tokens` in the model's context, and say how many. False: one such problem ends the run before it begins."""
    curriculum: Literal["none", "drop_solved", "target_rate"] = "none"
    """Which training problems an epoch visits, by the share of correct completions at their last visit. drop_solved: not those where it was 1. target_rate: the nearer to `target_rate`, the more often. Not for an endless split (task `word_problems`)."""
    target_rate: Annotated[float, "(0, 1)"] = 0.5
    """Curriculum target_rate: the share of correct completions that is sought. At 0.5 groups have the most spread."""


@dataclass(frozen=True)
class PromptConfig:
    style: Literal["plain", "chat"] = "plain"
    """plain: text with few-shot exemplars, for base models. chat: the tokenizer's chat template, for instruct models."""
    shots: Annotated[int, "[0, 8]"] = 8
    """Worked exemplars before the question, 0 to 8."""
    exemplars: Literal["builtin", "train"] = "builtin"
    """builtin: the task's own eight; of gsm8k and jsonl short ones written for this project, of other rows the first of the training split. train: drawn from the training split with `exemplar_seed`, never the problem itself."""
    exemplar_seed: int = 0
    """Seed of the exemplars drawn from the training split."""
    template_options: tuple[str, ...] = ()
    """Style chat: what the template is told besides the messages, each name=value in JSON, such as enable_thinking=false for Qwen3."""


@dataclass(frozen=True)
class RewardsConfig:
    format_weight: Annotated[float, "[0, inf)"] = 0.5
    """Weight of the `format` component."""
    correctness_weight: Annotated[float, "[0, inf)"] = 1.0
    """Weight of the `correctness` component."""
    require_finish: bool = True
    """Pay nothing to a completion that ran into the length limit, and no more than to the worst that did not. Without it, text that never ends can earn (seen: length goes to the limit, accuracy to 0)."""
    functions: tuple[str, ...] = ()
    """Further components: path/to/file.py:function or module:function, each `(completions, **columns) -> list of float or None`; named after the function, weight 1."""
    weights: tuple[str, ...] = ()
    """Weights over the task's own and over 1: component=number, such as parses=0.1."""
    workers: Annotated[int, "[0, inf)"] = 0
    """Processes of each rank that score; 0: this rank's share of the cores, at most 16."""
    timeout_s: Annotated[float, "(0, inf)"] = 5.0
    """Seconds that one call of a reward function may take. Who takes longer is killed and its completions are tried one by one; what is late alone is unscored."""
    step_timeout_s: Annotated[float, "(0, inf)"] = 600.0
    """Seconds that all scoring of a step may take on one rank; what is not scored by then is unscored. The other ranks wait so long: less than distributed.timeout_s."""
    max_unscored: Annotated[float, "[0, 1]"] = 0.25
    """Share of a step's completions that may go unscored (error or timeout) before the run ends."""
    sandbox: Literal["auto", "bubblewrap", "namespaces", "unsafe_subprocess"] = "auto"
    """Where code of the model runs (task `code`). auto: bubblewrap, else Linux namespaces, whichever stops every attack of a self-test; else the task is refused. unsafe_subprocess: limits on time and memory only, with your files and network in reach."""


@dataclass(frozen=True)
class RolloutConfig:
    prompts_per_step: Annotated[int, "[1, inf)"] = 16
    """Prompts per training step, over all ranks (P)."""
    group_size: Annotated[int, "[1, inf)"] = 8
    """Completions of each prompt (G)."""
    max_new_tokens: Annotated[int, "[1, inf)"] = 40
    """Longest completion, in tokens."""
    temperature: Annotated[float, "[0, inf)"] = 1.0
    """Divides the logits, while sampling and in the loss alike. Validation and test are greedy, which is 0, whatever it is."""
    top_p: Annotated[float, "(0, 1]"] = 1.0
    """Nucleus sampling. Training wants 1: the loss must see the distribution that was sampled."""
    top_k: Annotated[int, "[0, inf)"] = 0
    """Keep the k most likely tokens; 0 keeps all. Training wants 0."""
    min_p: Annotated[float, "[0, 1]"] = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 keeps all. Training wants 0."""
    max_sequences: Annotated[int, "[1, inf)"] = 512
    """Sequences decoded at a time on one rank; more are done in turns."""
    prefill_tokens: Annotated[int, "[1, inf)"] = 16384
    """Prompt tokens per prefill pass."""
    kv_gib: Annotated[float | None, "(0, inf)"] = None
    """Most memory for keys and values while sampling, in GiB; where it is short, sequences take turns. None: 30 % of the device's memory, on CPU of this rank's share of what the machine or its container has. Only what a rollout can use is allocated; on CUDA it stays between rollouts if it is at most 20 % of the memory."""
    cuda_graph: bool = True
    """Replay whole decode steps as CUDA graphs. Where a model cannot be captured, it says why and goes on without."""


@dataclass(frozen=True)
class ObjectiveConfig:
    preset: str = "grpo"
    """A row of the table in grpo/objectives.py: grpo, dr_grpo, dapo, gspo, cispo, rloo or sapo. Every field below that is None takes its value from there."""
    advantages: str | None = None
    """How rewards become advantages: group, group_mean, batch, rloo or per_reward."""
    surrogate: str | None = None
    """Per-token objective: clip, dual_clip, sequence, sequence_token, cispo, sapo, reinforce, or your own my_file.py:my_function."""
    aggregation: str | None = None
    """Token weights: sequence_mean, token_mean or constant."""
    clip_low: Annotated[float | None, "(0, 1]"] = None
    """Ratio clip range below 1."""
    clip_high: Annotated[float | None, "(0, inf)"] = None
    """Ratio clip range above 1; of cispo: the weight is capped at 1 + clip_high."""
    ratio_cap: Annotated[float | None, "(1, inf)"] = None
    """dual_clip: largest ratio that pulls where the advantage is negative; above 1 + clip_high."""
    tau_positive: Annotated[float | None, "(0, inf)"] = None
    """sapo: steepness of the gate where the advantage is positive."""
    tau_negative: Annotated[float | None, "(0, inf)"] = None
    """sapo: steepness of the gate where it is not."""
    beta: Annotated[float | None, "[0, inf)"] = None
    """Coefficient of the KL to the reference; 0 loads no reference."""
    kl_estimator: str | None = None
    """Estimator of the KL: k1, k2 or k3. docs/objectives.md shows what the gradient of each is."""
    kl_where: Literal["loss", "reward"] | None = None
    """loss: per token. reward: its sum over the completion is taken from the reward before advantages are made (k1 only)."""
    kl_corrected: bool | None = None
    """Multiply the KL in the loss by the ratio, so that its gradient is that of KL(policy || reference), off-policy too."""
    ref_refresh_every: Annotated[int | None, "[0, inf)"] = None
    """Bring the reference nearer to the policy after every this many training steps; 0: it stays as it was loaded. In bf16 it then has fp32 masters of its own: 4 bytes a parameter."""
    ref_mix: Annotated[float | None, "(0, 1]"] = None
    """How near: reference <- (1 - ref_mix) reference + ref_mix policy. 1 is a copy, less a moving average."""
    entropy_bonus: Annotated[float | None, "[0, inf)"] = None
    """Coefficient of the mean token entropy, weighted as the surrogate is, which is then maximised too. The exact entropy of every distribution, not that of the token drawn."""
    entropy_share: Annotated[float | None, "(0, 1]"] = None
    """Share of tokens, those of highest entropy over the whole optimizer step, that contribute a gradient (arXiv:2506.01939: 0.2); 1: all. The denominators stay."""
    mask_truncated: bool | None = None
    """Leave completions that ran into the length limit out of the loss and its denominators; they stay in their group's mean."""
    mismatch: str | None = None
    """Correction of sampler against training log-probs: none, token_truncate, sequence_truncate (weights, at most mismatch_cap) or sequence_mask (sequences outside 1/cap to cap are left out)."""
    mismatch_level: Literal["mean", "sum"] | None = None
    """Log-ratio of a sequence. sum: the unbiased weight, which rejects long completions more and more. mean: biased as a weight, right for rejection."""
    mismatch_cap: Annotated[float | None, "(1, inf)"] = None
    """Largest weight; above 1."""
    dynamic_sampling: bool | None = None
    """Draw further prompts in place of groups without spread, until the step is full of groups that teach."""
    max_draws: Annotated[int | None, "[1, inf)"] = None
    """dynamic_sampling: rollouts per step at most; if the step is not full then, groups without spread fill it."""
    overlong_share: Annotated[float | None, "[0, 1]"] = None
    """Last part of rollout.max_new_tokens over which a penalty grows from 0 to 1 reward; 0: no penalty."""


@dataclass(frozen=True)
class BatchConfig:
    layout: Literal["auto", "packed", "padded"] = "auto"
    """packed: whole groups in one row, each prompt computed once. padded: a row per sequence, the prompt in each. auto: packed, but padded for a model whose layers cannot share a prompt. Speed and memory only."""
    tokens_per_micro_batch: Annotated[int | None, "[1, inf)"] = None
    """Tokens, as laid out, of one forward and backward pass on one rank. Memory only: it cannot change the gradient. None: 16,384 on CUDA; 4,096 on a CPU, whose cache larger ones leave."""
    minibatches: Annotated[int, "[1, inf)"] = 1
    """Optimizer steps per pass over a rollout: contiguous blocks of prompts."""
    passes: Annotated[int, "[1, inf)"] = 1
    """Passes over each rollout. With more than one optimizer step in all, old log-probs come from a pass of the training forward."""


@dataclass(frozen=True)
class OptimConfig:
    lr: Annotated[float, "(0, inf)"] = 2e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine that would reach 0 one step after the last."""
    warmup: Annotated[float, "[0, 1]"] = 0.1
    """Linear warm-up, as a fraction of num_steps."""
    betas: Annotated[tuple[float, float], "[0, 1)"] = (0.9, 0.99)
    """AdamW moment decays. 0.99 rather than 0.999: runs are short."""
    eps: Annotated[float, "(0, inf)"] = 1e-8
    """AdamW denominator offset."""
    weight_decay: Annotated[float, "[0, inf)"] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, "(0, inf)"] = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: Annotated[int, "[0, inf)"] = 3
    """Optimizer steps in a row that are skipped because their loss or gradient is not finite; one more ends the run."""


@dataclass(frozen=True)
class EvalConfig:
    every: Annotated[int, "[0, inf)"] = 10
    """Validate every this many steps; 0 never. The best checkpoint is kept by validation accuracy."""
    validation_problems: Annotated[int, "[1, inf)"] = 200
    """Validation problems per evaluation (greedy)."""
    test_problems: Annotated[int, "[0, inf)"] = 200
    """Test problems, evaluated before and after training only; 0 skips the test."""


@dataclass(frozen=True)
class DistributedConfig:
    strategy: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """What ranks share out. ddp: nothing. zero1: fp32 masters and Adam moments, with the gradients of ddp to the bit. fsdp: gradients too, and the bf16 copy that samples is there for the rollout alone (docs/scale.md). One rank has everything in any case."""
    timeout_s: Annotated[float, "(0, inf)"] = 1800.0
    """Seconds that ranks wait for each other; then the run ends with a message that names the rank that did not answer."""
    term_grace_s: Annotated[float, "(0, inf)"] = 25.0
    """Seconds that a step may still take after SIGTERM; then the run leaves on its last checkpoint. Below torchrun's 30, after which it kills."""


@dataclass(frozen=True)
class BaseConfig:
    """The embedded model and its supervised training; only used when model.path is empty."""

    hidden_size: Annotated[int, "[1, inf)"] = 128
    """Width, a multiple of 2 * num_heads."""
    num_layers: Annotated[int, "[1, inf)"] = 2
    """Layers."""
    num_heads: Annotated[int, "[1, inf)"] = 4
    """Attention heads."""
    intermediate_size: Annotated[int, "[1, inf)"] = 256
    """MLP width."""
    num_solutions: Annotated[int, "[0, inf)"] = 0
    """Worked solutions that supervised training may see, again and again; 0: a fresh one every time."""
    unseen_words: tuple[str, ...] = ()
    """Words of which no question has any whose worked solution supervised training may see; GRPO meets them."""
    steps: Annotated[int, "[1, inf)"] = 350
    """Optimizer steps on worked solutions, at most."""
    stop_accuracy: float = 1.0
    """Stop that phase early once validation accuracy (greedy) reaches this."""
    batch_size: Annotated[int, "[1, inf)"] = 64
    """Solutions per optimizer step."""
    lr: Annotated[float, "(0, inf)"] = 3e-3
    """Peak learning rate of AdamW: linear warm-up over 20 steps, constant, then linear decay to 0."""
    decay: Annotated[float, "(0, 1]"] = 0.4
    """Share of the steps over which the learning rate decays; the biggest single gain in accuracy."""
    answer_lines: Annotated[float, "[0, 1]"] = 1.0
    """Share of the supervised texts that close with the answer line; below 1, GRPO has the format to teach too."""
    guess_share: Annotated[float, "[0, 1]"] = 0.0
    """Share of the supervised texts that answer without working ("I think 13."). A habit needs a few, or its words are new to the model and teaching them does harm."""
    habit_steps: Annotated[int, "[0, inf)"] = 0
    """Further steps that teach the habit of answering without working; 0: no such phase."""
    habit_share: Annotated[float, "[0, 1]"] = 0.7
    """Share of the habit phase's texts that answer without working."""
    habit_lr: Annotated[float, "(0, inf)"] = 5e-4
    """Peak learning rate of the habit phase, same schedule."""
    continue_lr: Annotated[float, "(0, inf)"] = 1e-3
    """Peak learning rate of the supervised training that goes on, on the same solutions, for as long as GRPO took."""
    validate_every: Annotated[int, "[0, inf)"] = 50
    """Validate every this many supervised steps; 0: only at the end of a phase."""
    validation_problems: Annotated[int, "[1, inf)"] = 200
    """Validation problems per evaluation of supervised training (greedy)."""


@dataclass(frozen=True)
class Config:
    """Everything a run is made of. Written, resolved, into the run folder."""

    task: str = "word_problems"
    """word_problems (embedded), gsm8k, jsonl (any file with a prompt and an answer column), code or keywords (rows with tests or key terms; small embedded sets), or path/to/file.py:ClassName."""
    seed: Annotated[int, "[0, 4294967295]"] = 0
    """Seeds initialisation, the order of problems and every sampled token."""
    num_steps: Annotated[int, "[1, inf)"] = 50
    """Training steps: rollouts."""
    save_every: Annotated[int, "[1, inf)"] = 25
    """Checkpoint every this many steps; one is always written at the end."""
    keep_last: Annotated[int, "[1, inf)"] = 2
    """Checkpoints kept besides the best one."""
    log_groups: Annotated[int | None, "[0, inf)"] = None
    """Groups of each step whose completions are written into completions/, the first ones; None: all. Long completions fill a disk: 1,024 of some 4,500 tokens are 30 MB, every step."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Kernels: auto decides by device, dtype and shape, and says what it chose."""
    deterministic: bool = False
    """CUDA: only operations that give the same bits every time, so that a resumed run repeats the lost steps exactly; slower. On CPU it is always so."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = None
    """Trackers that get every metric besides metrics.jsonl, and the completions as tables where they can: tensorboard, wandb, mlflow, trackio. None: tensorboard where it is installed."""
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
THEIRS = {  # names that other trainers have for our keys
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
    """A key that this version does not have."""


def from_dict(values: Any, section: type = Config, prefix: str = "") -> Any:
    """Nested plain values -> Config, or one `section` of it; what is left out keeps its default.

    An integer may stand for a float and a list for a tuple. Raises ValueError that names the dotted key: for an
    unknown one together with the nearest known, for a wrong type with the value and what was expected.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix[:-1] or 'config'}={values!r} is no section; expected keys with values")
    kinds = typing.get_type_hints(section)
    for name in values:
        if name not in kinds:
            known = [prefix + sibling for sibling in kinds] + known_keys()
            raise UnknownKey(f"unknown key {prefix}{name}{nearest(f'{prefix}{name}', known)}")
    return section(**{name: _convert(kinds[name], value, prefix + name) for name, value in values.items()})


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first of its values would be lost without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: key {key.value} stands twice; keep one of them")
            seen.add(key.value)
        return node


def load(path: Path | str) -> Config:
    """The config in a YAML file; an error names the file."""
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
    """Every field as YAML, defaults included; `load` gives the same config back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def save(config: Config, path: Path | str) -> None:
    """Write what `dump` says."""
    unfinished = Path(path).with_suffix(".tmp")  # a kill in between must not leave half a file: runs resume with it
    unfinished.write_text(dump(config), encoding="utf-8")
    unfinished.replace(path)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys, in reading order: task, ..., model.path, ..."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def known_keys() -> list[str]:
    """Every dotted key of a value."""
    return list(flat(asdict(Config())))


def nearest(key: str, known: Collection[str], spell: Callable[[str], str] = str) -> str:
    """`; the nearest is ...` or nothing: what another trainer's name stands for, else the known key whose last part is
    spelled most alike; of several that in the same section, else the first."""
    section, _, name = key.rpartition(".")
    last = lambda candidate: candidate.rpartition(".")[2]
    spelling = difflib.get_close_matches(name, map(last, known), n=1)
    alike = [THEIRS[name]] if THEIRS.get(name) in known else [each for each in known if [last(each)] == spelling]
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
    if type(value) is kind:  # exactly: True is no int
        return value
    expected = f"one of {', '.join(map(repr, arguments))}" if origin is Literal else getattr(kind, "__name__", kind)
    if origin is tuple:
        expected = "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
    raise ValueError(f"{key}={value!r} is {type(value).__name__}; expected {expected}")
