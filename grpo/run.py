"""A run: every part that a training step needs, built once; evaluation, checkpoints and resuming.

The only file of this package that imports from nearly all others. train.py, which has the loop, and grpo.results, which
makes the final report, work on a `Run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from grpo import base, checkpoint, lora, trackers
from grpo.attention import choose_layout
from grpo.command_line import Command
from grpo.config import Config, ObjectiveConfig, flat, load, save
from grpo.config_check import changes, check
from grpo.distributed import World
from grpo.evaluation import CORRECTNESS, Evaluation, evaluate
from grpo.logprobs import LogprobModel, PolicyModule
from grpo.metrics import RunLogger, environment, token_texts
from grpo.objectives import Objective, check_steps, resolve
from grpo.policy import MovingReference, Policy, load_model_config, load_reference
from grpo.records import Problem
from grpo.rewards import score_groups
from grpo.rewards.pool import make_pool
from grpo.rollout import EVALUATION, TRAINING, Sampler
from grpo.sharding import distribute
from grpo.tasks import Task, make_task
from grpo.tasks.prompts import Prompter
from grpo.tasks.stream import ProblemStream
from grpo.tasks.word_problems import WordProblems
from grpo.update import Updater, make_optimizer
from grpo.user_code import with_absolute_path
from kernels import dispatch_table, missing_to_launch, old_capability

BASE_CACHE = Path(".cache") / "base"
TOKENS_PER_MICRO_BATCH = {"cuda": 16_384, "cpu": 4_096}


def resolve_config(config: Config, world: World) -> tuple[Config, Objective]:
    """Check the config and resolve it. Returns it with every choice of the objective, every default that depends on the
    device and absolute paths of a user's own files filled in, and the objective.

    ValueError for what cannot work, before a run folder is made.
    """
    world.require_same({key: _without_folder(key, value) for key, value in flat(asdict(config)).items()})
    check(config, world.size)
    functions, surrogate = config.rewards.functions, config.objective.surrogate
    config = replace(
        config,
        task=with_absolute_path(config.task),
        rewards=replace(config.rewards, functions=tuple(map(with_absolute_path, functions))),
        objective=replace(config.objective, surrogate=surrogate and with_absolute_path(surrogate)),
    )
    config, objective = fill_in_objective(config)
    check_steps(objective, config.batch.passes * config.batch.minibatches)
    trackers.chosen(config.track)
    if config.impl == "triton":
        dispatch_table(config.impl, world.device)  # ValueError on a device that cannot run Triton
    task = make_task(config.task, config.data, config.rewards)
    task.check_path()
    if isinstance(task, WordProblems):
        make_stream(config, task.split("train"))  # ValueError for a curriculum: the split is endless
    elif not config.model.path:
        message = f"task {config.task} without model.path: the embedded model knows word_problems only; name a model"
        raise ValueError(message)
    if config.model.path:
        load_model_config(config.model.path)
    model, batch = config.model, config.batch
    if model.compile is None:
        cannot_compile = config.deterministic or model.gradient_checkpointing or config.distributed.strategy == "fsdp"
        cannot_compile = cannot_compile or missing_to_launch() or old_capability(world.device)
        model = replace(model, compile=world.device.type == "cuda" and not cannot_compile)
    if batch.tokens_per_micro_batch is None:
        batch = replace(batch, tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH[world.device.type])
    return replace(config, model=model, batch=batch), objective


def _without_folder(key: str, value: object) -> object:
    """A setting without the folder it names: ranks on different machines may keep the same files in other places."""
    if key.endswith(".path"):
        return value and "a path"
    if isinstance(value, tuple):
        return [_without_folder(key, item) for item in value]
    return value.rpartition(":")[2] if isinstance(value, str) and ".py:" in value else value


def fill_in_objective(config: Config) -> tuple[Config, Objective]:
    """`config` with every choice of its objective filled in, and the objective."""
    objective = resolve(**asdict(config.objective))
    return replace(config, objective=ObjectiveConfig(preset=config.objective.preset, **asdict(objective))), objective


def make_stream(config: Config, problems: Sequence[Problem]) -> ProblemStream:
    """The training problems, in the order in which steps take them."""
    curriculum = {"curriculum": config.data.curriculum, "target_rate": config.data.target_rate}
    return ProblemStream(problems, seed=config.seed, **curriculum)


class Run:
    """Everything that a training step needs, built once; cheap parts first, so that mistakes are found early."""

    def __init__(self, config: Config, objective: Objective, world: World, run_dir: Path):
        self.config, self.world = config, world
        tracked = trackers.chosen(config.track)
        self.log = RunLogger(run_dir, is_writer=world.is_writer, track=tracked, config=flat(asdict(config)))
        self.task = make_task(config.task, config.data, config.rewards)
        splits = {name: self.task.split(name) for name in ("train", "validation", "test")}
        is_embedded = not config.model.path
        self.base_folder = prepare_base(config, self.task, world, self.log) if is_embedded else None
        where = {"precision": config.model.precision, "device": world.device}
        policy = lora.load(str(self.base_folder or config.model.path), config.lora, **where, seed=config.seed)
        lengths = {"context_length": policy.context_length, "max_new_tokens": config.rollout.max_new_tokens}
        self.policy, self.prompter = policy, Prompter(self.task, config.prompt, policy.tokenizer, **lengths)
        fit = {"drop": config.data.drop_overlong, "say": self.log.say}
        self.problems = {name: self.prompter.fitting(problems, **fit) for name, problems in splits.items()}
        self.stream = make_stream(config, self.problems["train"])
        world.require_same({"training problems": self.stream.data})  # compared by a hash of questions and answers
        # moving_reference: a MovingReference if the reference is refreshed, else None
        self.module, wrapped, self.reference, self.moving_reference = build_models(config, world, policy, objective)
        self.log.say(f"trainable parameters: {sum(parameter.numel() for parameter in policy.trained):,}")
        self.layout, why = choose_layout(config.batch.layout, policy.model)  # of micro-batches: packed or padded
        self.log.say(f"layout of micro-batches: {self.layout} ({why})")
        optim = config.optim
        self.updater = Updater(
            module=wrapped,
            optimizer=make_optimizer(policy.trained, optim, local_parameters=list(policy.local_parameters.values())),
            objective=objective,
            world=world,
            max_grad_norm=optim.max_grad_norm,
            refresh=policy.refresh,
            tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
            max_skipped_steps=optim.max_skipped_steps,
            say=self.log.say,
        )
        self.sampler = make_sampler(config, policy.model, self.prompter, self.log)
        # Saved with checkpoints, so that others stop generating where training did: a base model's config may lack the
        # end-of-turn token.
        policy.model.generation_config.eos_token_id = sorted(self.sampler.ending.eos)
        self.pool = make_pool(config.rewards)  # the worker processes that score
        scoring = {"require_finish": config.rewards.require_finish, "score": self.pool}
        self.score = partial(score_groups, rewards=self.task.rewards, **scoring)
        self.token_text = token_texts(policy.tokenizer)  # for logged completions
        self.writer = checkpoint.Writer(run_dir, keep_last=config.keep_last)
        self.first_step = 1  # of this process
        # What changes during the run:
        self.best: tuple[float, int] | None = None  # validation accuracy and step of the best checkpoint
        self.before: dict | None = None  # results of the untrained model


def describe(run: Run) -> None:
    """Write config.yaml and env.json and print a line about the run. Called after loading the checkpoint, if any: a
    resume that fails leaves both as they were."""
    config, world, log = run.config, run.world, run.log
    dispatch = {op: choice._asdict() for op, choice in dispatch_table(config.impl, world.device).items()}
    if world.is_writer:
        save(config, log.run_dir / "config.yaml")
    log.write_json("env.json", environment(seed=config.seed, world_size=world.size, dispatch=dispatch))
    kernels_used = ", ".join(f"{op}={choice['impl']}" for op, choice in dispatch.items())
    layers = "; layers are compiled, a minute or two at the start" if config.model.compile else ""
    log.say(f"run folder {log.run_dir}; {world.size} x {world.device.type}; kernels: {kernels_used}{layers}")


def prepare_base(config: Config, task: Task, world: World, log: RunLogger) -> Path:
    """The embedded base model: trained by rank 0 while the others wait, or found in the cache."""

    def work() -> str:
        log.say("preparing the embedded base model (supervised; cached after the first time)")
        where = {"device": str(world.device), "cache_dir": BASE_CACHE}
        with log.timer("base"):
            folder = base.prepare_base(config.base, task, seed=config.seed, **where, progress=log.progress)
        log.say(base.describe(folder))
        return str(folder)

    return Path(world.run_on_writer("base", work))


def build_models(
    config: Config, world: World, policy: Policy, objective: Objective
) -> tuple[PolicyModule, torch.nn.Module, LogprobModel | None, MovingReference | None]:
    """(PolicyModule, the same wrapped for all ranks, reference or None, MovingReference or None)."""
    options = {"temperature": config.rollout.temperature, "impl": config.impl, "compile": config.model.compile}
    # Copies are made before PolicyModule, which may enable gradient checkpointing: later copies would have it, too.
    if world.size > 1 and config.distributed.strategy == "fsdp":
        policy.sample_from_copy()
    moving = MovingReference(policy) if objective.ref_refresh_every else None
    reference = None
    if objective.beta:
        reference = LogprobModel(moving.model if moving else load_reference(policy), **options)
        if config.model.reference_offload:
            reference.keep_on_cpu()
    module = PolicyModule(
        policy,
        **options,
        entropy_gradient=objective.entropy_bonus > 0,
        checkpointing=config.model.gradient_checkpointing,
    )
    wrapped = distribute(module, [policy, moving] if moving else [policy], world, config.distributed.strategy)
    return module, wrapped, reference, moving


def make_sampler(
    config: Config, model: torch.nn.Module, prompter: Prompter, log: RunLogger, *, greedy: bool = False
) -> Sampler:
    """The sampler for training, or with greedy=True for evaluation: one completion, always the most likely token."""
    rollout = replace(config.rollout, group_size=1, temperature=0.0) if greedy else config.rollout
    how = {"stop": prompter.stop_strings, "stream": EVALUATION if greedy else TRAINING, "seed": config.seed}
    how |= {"compile": config.model.compile, "impl": config.impl, "progress": log.progress}
    return Sampler(model, prompter.tokenizer, rollout, **how)


def validate(run: Run, step: int) -> dict[str, float]:
    """Greedy accuracy and rewards on the validation split, as metrics; remembers the best step so far in run.best."""
    result = evaluate_greedily(run, "validation", run.config.eval.validation_problems, step=step)
    if step and (run.best is None or result.accuracy >= run.best[0]):  # a tie goes to the later step: it has seen more
        run.best = (result.accuracy, step)
    judged = {name: mean for name, mean in result.components.items() if name != CORRECTNESS and mean is not None}
    others = {f"validation/{name}": mean for name, mean in judged.items()}
    unscored = {"validation/unscored": result.unscored} if result.unscored else {}
    return {"validation/accuracy": result.accuracy, **others, **unscored}


def evaluate_greedily(
    run: Run, split: str, limit: int, *, step: int = 0, model: torch.nn.Module | None = None
) -> Evaluation:
    """Evaluate one greedy completion for each of the first `limit` problems of a split, by the policy or `model`."""
    problems = run.prompter.ask([replace(problem, index=i) for i, problem in enumerate(run.problems[split][:limit])])
    sampler = make_sampler(run.config, model or run.policy.model, run.prompter, run.log, greedy=True)
    with run.policy.weights_loaded():
        return evaluate(sampler, problems, run.score, world=run.world, step=step)


# Saving and resuming --------------------------------------------------------------------------------------------------


def open_run(command: Command, world: World) -> tuple[Path, Path | None]:
    """The run folder, chosen by rank 0 for all, and the checkpoint to resume from, if any."""
    if command.config.lora.quantize != "none":
        lora.bitsandbytes()  # ValueError for a missing library, before a run folder is made

    # A rank that failed was restarted by its own machine's torchrun; only that one counts the restart.
    is_restart = bool(world.max(torch.tensor(float(checkpoint.restarted_by_launcher()))))

    def choose() -> tuple[Path, Path | None]:
        """On rank 0. Changes to the config of a resumed run are printed, or refused by ValueError."""
        path = Path(command.resume or command.run_dir or checkpoint.default_run_dir(command.config_path.stem))
        is_resumed = bool(command.resume) or (is_restart and checkpoint.latest(path) is not None)
        checkpoint.open_run_dir(path, resume=bool(command.resume), is_restart=is_restart)
        if is_resumed:
            before, _ = fill_in_objective(load(path / "config.yaml"))  # an older version may have saved fewer keys
            harmless, others = changes(before, command.config)
            for line in harmless:
                print(f"changed: {line}", flush=True)
            for line in others:
                print(f"CHANGED; repeated steps will differ: {line}", flush=True)
        return path, checkpoint.newest_intact(path) if is_resumed else None

    return world.run_on_writer("run_dir", choose)


def stateful_parts(run: Run) -> dict:
    """The stateful parts, by their name in a checkpoint."""
    named = {"policy": run.policy, "optimizer": run.updater.optimizer, "updater": run.updater}
    named |= {"stream": run.stream, "log": run.log, "reference": run.moving_reference}
    return {name: part for name, part in named.items() if part is not None}


def save_checkpoint(run: Run, step: int) -> None:
    """Save everything stateful: copied now, between two steps, and written by rank 0 while training continues."""
    state = {name: part.state_dict() for name, part in stateful_parts(run).items()}
    by_rank = run.world.gather({"sampler": run.sampler.state_dict(), "random": checkpoint.random_state()})
    state |= {"step": step, "best": run.best, "before": run.before, "by_rank": by_rank}
    if run.world.is_writer:
        write_model = lambda folder, state: run.policy.save(folder, state["policy"])
        run.writer.save(step, write_model, state, best=run.best)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Restore what `save_checkpoint` saved. ValueError if it does not fit this config."""
    state = checkpoint.load_state(folder)
    named = stateful_parts(run)
    for name in named:
        if name not in state:
            raise ValueError(f"{folder} has no state of the {name}: it was saved under another config; use that config")
    settings = {key: value for key, value in run.updater.optimizer.param_groups[0].items() if key != "params"}
    for name, part in named.items():
        part.load_state_dict(state[name])
    run.updater.optimizer.param_groups[0].update(settings)  # the config's betas and decay, not the saved ones
    if state["step"] > run.config.num_steps:
        raise ValueError(
            f"num_steps={run.config.num_steps}: {folder} was saved after more steps; use {state['step']} or more"
        )
    world = run.world
    local = state["by_rank"][world.rank % len(state["by_rank"])]
    run.sampler.load_state_dict(local["sampler"])
    checkpoint.set_random_state(local["random"])
    restore = lambda: checkpoint.restore_best(run.log.run_dir, state["best"], run.log.say)
    run.best = world.run_on_writer("best", restore)
    run.before, run.first_step = state["before"], state["step"] + 1
    run.log.say(f"resuming from {folder}")
    before = len(state["by_rank"])
    if before != world.size:
        run.log.say(f"resumed with {world.size} ranks instead of {before}: the same batches, sums rounded differently")
