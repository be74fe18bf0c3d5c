"""Train a language model with GRPO: build, then the step again and again, then the result.

    python train.py                                       the embedded demo, or GSM8K where there is a CUDA device
    torchrun --nproc_per_node=8 train.py --config FILE    the same over 8 ranks

Only this file and eval.py see every room. No maths and no tensor indexing here: read `train_step` first, it names
the rooms in the order in which data flows through them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from grpo import base, checkpoint, distributed, lora, trackers
from grpo.advantages import fill_with_teaching, normalise, overlong_penalty, zero_spread_share
from grpo.attention import choose_layout
from grpo.batch import correct_mismatch, counted_completions, keep_high_entropy, kl_by_completion, pack, weigh
from grpo.command_line import Command, parse_command
from grpo.config import Config, ObjectiveConfig, get, known_keys, load, save
from grpo.config_check import changes, check
from grpo.distributed import StopRequest, World
from grpo.dry_run import dry_run_report, model_facts
from grpo.evaluation import CORRECTNESS, Evaluation, evaluate, result_table
from grpo.logprobs import LogprobModel, PolicyModule, check_packing, frozen_logprobs
from grpo.metrics import RunLogger, completion_records, environment, length_metrics, token_texts
from grpo.objectives import Objective, check_steps, resolve
from grpo.policy import MovingReference, Policy, load_model_config, load_policy, load_reference
from grpo.records import Batch, Group, Scores, join_scores, merge_scores
from grpo.rewards import refuse_unscored, score_groups
from grpo.rewards.pool import Pool, make_pool
from grpo.rollout import EVALUATION, TRAINING, Sampler, Sampling
from grpo.sharding import distribute
from grpo.tasks import Task, make_task
from grpo.tasks.prompts import Prompter
from grpo.tasks.stream import ProblemStream
from grpo.update import Updater, learning_rate, make_optimizer, update_policy
from kernels import dispatch_table

BASE_CACHE = Path(".cache") / "base"


@dataclass
class Run:
    """Everything that a step needs, built once; the fields from `best` on change as the run goes on."""

    config: Config
    world: World
    log: RunLogger
    task: Task
    prompter: Prompter
    stream: ProblemStream
    policy: Policy
    module: PolicyModule
    layout: str  # of micro-batches: packed or padded
    reference: LogprobModel | None
    moving: MovingReference | None  # the weights of the reference, where it is refreshed
    sampler: Sampler
    pool: Pool  # the worker processes that score
    token_text: Callable[[int], str]  # for people to read
    updater: Updater
    writer: checkpoint.Writer
    base_folder: Path | None  # of the embedded base model
    best: tuple[float, int] | None = None  # validation accuracy and step of the best checkpoint
    before: dict | None = None  # what the untrained model scored
    steps_done: int = 0


def train_step(run: Run, step: int) -> dict[str, float]:
    """One rollout and its optimizer steps. Steps count from 1."""
    config, world, timer, objective = run.config, run.world, run.log.timer, run.updater.objective
    drawn, drawn_scores = draw(run, step)
    teaching = fill_with_teaching(drawn_scores.total, drawn_scores.scored, config.rollout.prompts_per_step)
    everyones, scores = [drawn[i] for i in teaching], drawn_scores.pick(teaching)
    groups = world.mine(everyones)
    with timer("update"):
        layout = asdict(config.batch) | {"layout": run.layout, "tokens_per_micro_batch": run.updater.token_budget}
        if run.layout == "packed" and step == run.steps_done + 1:
            with run.policy.at_hand():
                error = check_packing(run.module, groups, world.device)
            run.log.say("packed log-probs of one group are off by {:.1g} nats, {:.1g} at most".format(*error))
        rewards = scores.total + length_penalty(run, everyones)
        by_component = {"components": scores.components, "weights": scores.weights}
        advantages = normalise(objective.advantages, rewards, scores.scored, **by_component)
        silent = None if objective.hears_all else world.mine((advantages == 0).all(1)).tolist()
        batch = pack(groups, **layout, silent=silent, max_over_ranks=world.max, device=world.device)
        frozen_logprobs(batch, run.module, run.reference, always_policy=objective.needs_frozen_pass)
        if objective.kl_in_reward:
            advantages = normalise(objective.advantages, rewards - kl_penalty(run, batch), scores.scored)
        set_weights(run, batch, groups, advantages, scores.scored)
        torch.manual_seed(hash((config.seed, step, world.rank)))  # of dropout, resumed or not
        optim = config.optim
        lr = learning_rate(step, optim.lr, optim.schedule, warmup=optim.warmup, num_steps=config.num_steps)
        metrics = update_policy(run.updater, batch, step=step, lr=lr, progress=run.log.progress)
        if run.moving and step % objective.ref_refresh_every == 0:
            run.moving.follow(run.policy, objective.ref_mix)
    run.log.log_completions(step, completion_records(everyones, scores, advantages, run.token_text))
    drawing = {"zero_spread_groups": zero_spread_share(drawn_scores.total, drawn_scores.scored)}
    drawing |= {"groups_dropped": 1 - len(everyones) / len(drawn), **run.stream.metrics()}
    return {**drawn_scores.means(), **drawing, **length_metrics(drawn, timer.since_taken()), **metrics, "lr": lr}


def draw(run: Run, step: int) -> tuple[list[Group], Scores]:
    """Everyone's groups and their scores: prompts_per_step of them, or more with dynamic sampling.

    A group that is drawn and not used is dropped: kept for later it would be off-policy.
    """
    config, world, timer, objective = run.config, run.world, run.log.timer, run.updater.objective
    groups, scores = [], []
    for _ in range(objective.max_draws if objective.dynamic_sampling else 1):
        with timer("rollout"):
            problems = world.mine(run.stream.take(config.rollout.prompts_per_step))
            with run.policy.at_hand():
                mine = run.sampler.generate([run.prompter(problem) for problem in problems], step)
            groups += world.interleave(world.gather(mine))
        with timer("score"):
            options = {"require_finish": config.rewards.require_finish, "score": run.pool}
            my_scores = score_groups(mine, run.task.rewards, **options)
            scores.append(merge_scores(world.gather(my_scores)))
            refuse_unscored(scores[-1], config.rewards.max_unscored)
            run.stream.remember(scores[-1].pass_rates(CORRECTNESS))
        drawn = join_scores(scores)
        teaching = len(groups) * (1 - zero_spread_share(drawn.total, drawn.scored))
        if round(teaching) >= config.rollout.prompts_per_step:
            break
    return groups, drawn


def length_penalty(run: Run, groups: list[Group]) -> Tensor:
    """What the objective adds to the rewards of everyone's groups for their lengths: [P, G], 0 or less."""
    lengths = torch.tensor([[len(completion.ids) for completion in group.completions] for group in groups])
    return overlong_penalty(lengths, run.config.rollout.max_new_tokens, run.updater.objective.overlong_share)


def kl_penalty(run: Run, batch: Batch) -> Tensor:
    """What the rewards of everyone's groups lose for their distance from the reference: [P, G]."""
    mine = kl_by_completion(batch, batch.lengths.shape)
    return run.updater.objective.beta * torch.stack(run.world.interleave(run.world.gather(list(mine))))


def set_weights(run: Run, batch: Batch, groups: list[Group], advantages: Tensor, scored: Tensor) -> None:
    """Final token weights of this rank's groups: aggregation, then the masks and corrections of the objective."""
    objective, world = run.updater.objective, run.world
    counted = counted_completions(groups, world.mine(scored), mask_truncated=objective.mask_truncated)
    weigh(
        batch,
        world.mine(advantages),
        counted,
        aggregation=objective.aggregation,
        max_new_tokens=run.config.rollout.max_new_tokens,
        sum_over_ranks=world.sum,
    )
    if objective.entropy_share < 1:
        keep_high_entropy(batch, objective.entropy_share, world.gather)
    if objective.mismatch != "none":
        correct_mismatch(batch, objective.mismatch, level=objective.mismatch_level, cap=objective.mismatch_cap)


def train(run: Run, stop: StopRequest) -> int:
    """Every step that is left; validation and checkpoints when they are due. The exit status: not 0 after a signal."""
    config, log = run.config, run.log
    for step in range(run.steps_done + 1, config.num_steps + 1):
        row = {"step": step, **train_step(run, step)}
        is_last = step == config.num_steps
        if config.eval.every and (is_last or step % config.eval.every == 0):
            with log.timer("evaluation"):
                row |= validate(run, step)
        log.log(row | log.timer.take())
        is_best = run.best is not None and run.best[1] == step
        status = stop.status()
        if is_last or is_best or status or step % config.save_every == 0:
            with log.timer("checkpoint"):
                save_checkpoint(run, step)
        if status:
            run.writer.wait()
            log.say(f"\nstopped after step {step}; go on with: python train.py --resume {log.run_dir}")
            return status
    run.writer.wait()
    return 0


def validate(run: Run, step: int) -> dict[str, float]:
    """Greedy scores on the validation split; the best step so far is remembered."""
    result = evaluate_greedily(run, "validation", run.config.eval.validation_problems, step=step)
    if step and (run.best is None or result.accuracy >= run.best[0]):  # of equals the later: it has seen more
        run.best = (result.accuracy, step)
    others = {f"validation/{name}": value for name, value in result.components.items() if name != CORRECTNESS}
    return {"validation/accuracy": result.accuracy, **others}


def evaluate_greedily(
    run: Run, split: str, limit: int, *, step: int = 0, model: torch.nn.Module | None = None
) -> Evaluation:
    """The most likely completion of each of a split's first problems, by the policy or another model."""
    problems = [run.prompter(replace(problem, index=i)) for i, problem in enumerate(run.task.split(split)[:limit])]
    sampler = make_sampler(run.config, model or run.policy.model, run.prompter, run.log, greedy=True)
    options = {"require_finish": run.config.rewards.require_finish, "score": run.pool}
    with run.policy.at_hand():
        return evaluate(sampler, problems, run.task.rewards, **options, world=run.world, step=step)


def build(command: Command, world: World, run_dir: Path) -> Run:
    """Every part of the run, in the order in which mistakes are cheapest to find."""
    config = command.config
    settings = {key: get(config, key) for key in known_keys()}
    log = RunLogger(run_dir, is_writer=world.is_writer, track=trackers.chosen(config.track), config=settings)
    task = make_task(config.task, config.data, config.rewards)
    splits = [task.split(name) for name in ("train", "validation", "test")]
    curriculum = {"curriculum": config.data.curriculum, "target_rate": config.data.target_rate}
    stream = ProblemStream(splits[0], seed=config.seed, **curriculum)
    base_folder = None if config.model.path else prepare_base(config, task, world, log)
    path = str(base_folder or config.model.path)
    where = {"precision": config.model.precision, "device": world.device}
    policy = lora.load(path, config.lora, **where, seed=config.seed)
    lengths = {"context_length": policy.context_length, "max_new_tokens": config.rollout.max_new_tokens}
    prompter = Prompter(task, config.prompt, policy.tokenizer, **lengths)
    for problems in splits:
        prompter.check(problems)
    objective = resolve(**asdict(config.objective))
    module, wrapped, reference, moving = build_models(config, world, policy, objective)
    log.say(f"parameters that are trained: {sum(parameter.numel() for parameter in policy.trained):,}")
    layout, why = choose_layout(config.batch.layout, policy.model)
    log.say(f"layout of micro-batches: {layout} ({why})")
    optim = config.optim
    adamw = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    optimizer = make_optimizer(policy.trained, optim.lr, **adamw, own=list(policy.own.values()))
    return Run(
        config=config,
        world=world,
        log=log,
        task=task,
        prompter=prompter,
        stream=stream,
        policy=policy,
        module=module,
        layout=layout,
        reference=reference,
        moving=moving,
        sampler=make_sampler(config, policy.model, prompter, log),
        pool=make_pool(config.rewards),
        token_text=token_texts(policy.tokenizer),
        updater=Updater(
            wrapped,
            optimizer,
            objective,
            world,
            optim.max_grad_norm,
            policy.refresh,
            config.batch.tokens_per_micro_batch,
            optim.max_skipped_steps,
            log.say,
        ),
        writer=checkpoint.Writer(run_dir, keep_last=config.keep_last),
        base_folder=base_folder,
    )


def build_models(
    config: Config, world: World, policy: Policy, objective: Objective
) -> tuple[PolicyModule, torch.nn.Module, LogprobModel | None, MovingReference | None]:
    """The policy as a module, alone and over all ranks, and its reference, fixed or moving (None where it is not)."""
    options = {"temperature": config.rollout.temperature, "impl": config.impl, "compile": config.model.compile}
    # Copies come before the module, which may turn gradient checkpointing on: a copy made then would take it along.
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
    """The sampler of training; or, greedy, that of evaluation: one completion, the most likely token every time."""
    rollout = config.rollout
    sampling = Sampling(
        group_size=1 if greedy else rollout.group_size,
        max_new_tokens=rollout.max_new_tokens,
        temperature=0.0 if greedy else rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=prompter.stop_strings,
        stream=EVALUATION if greedy else TRAINING,
    )
    limits = {name: getattr(rollout, name) for name in ("max_sequences", "prefill_tokens", "kv_gib")}
    limits |= {"cuda_graph": rollout.cuda_graph, "compile": rollout.compile}
    options = {"seed": config.seed, "impl": config.impl, "progress": log.progress}
    return Sampler(model, prompter.tokenizer, sampling, **limits, **options)


def prepare_base(config: Config, task: Task, world: World, log: RunLogger) -> Path:
    """The embedded base model: trained by rank 0 while the others wait, or found in the cache."""

    def work() -> str:
        log.say("preparing the embedded base model (supervised; cached after the first time)")
        where = {"device": str(world.device), "cache_dir": BASE_CACHE}
        with log.timer("base"):
            folder = base.prepare_base(config.base, task, seed=config.seed, **where, progress=log.progress)
        log.say(base.describe(folder))
        return str(folder)

    return Path(world.after_writer("base", work))


def parts(run: Run) -> dict:
    """What has a state, by its name in a checkpoint."""
    named = {
        "policy": run.policy,
        "optimizer": run.updater.optimizer,
        "updater": run.updater,
        "stream": run.stream,
        "log": run.log,
    }
    return named | ({"reference": run.moving} if run.moving else {})


def save_checkpoint(run: Run, step: int) -> None:
    """Everything stateful, copied between two steps and written by rank 0 while training goes on."""
    state = {name: part.state_dict() for name, part in parts(run).items()}
    by_rank = run.world.gather({"sampler": run.sampler.state_dict(), "random": checkpoint.random_state()})
    state |= {"step": step, "best": run.best, "before": run.before, "by_rank": by_rank}
    if run.world.is_writer:
        write_model = lambda folder, state: run.policy.save(folder, state["policy"])  # noqa: E731
        run.writer.save(step, write_model, state, best=run.best)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Go on exactly where `save_checkpoint` left off."""
    state = checkpoint.load_state(folder)
    for name, part in parts(run).items():
        if name not in state:
            raise ValueError(f"{folder} has no state of the {name}: it was saved under another config; use that one")
        part.load_state_dict(state[name])
    world = run.world
    mine = state["by_rank"][world.rank % len(state["by_rank"])]
    run.sampler.load_state_dict(mine["sampler"])
    checkpoint.set_random_state(mine["random"])
    recall = lambda: checkpoint.recall_best(run.log.run_dir, state["best"], run.log.say)  # noqa: E731
    run.best = world.after_writer("best", recall)
    run.before, run.steps_done = state["before"], state["step"]
    run.log.say(f"going on from {folder}")
    if len(state["by_rank"]) != world.size:
        run.log.say(
            f"{world.size} ranks where {len(state['by_rank'])} were: the same batches, sums rounded differently"
        )


def before_training(run: Run) -> None:
    """Test and validation accuracy of the untrained model."""
    run.before = {"results": {}, "samples": [], "validation": None}
    with run.log.timer("evaluation"):
        if run.config.eval.test_problems:
            result = evaluate_greedily(run, "test", run.config.eval.test_problems)
            run.before |= {"results": {"before": result.summary()}, "samples": samples_of(result)}
            run.log.say(f"before training, on the test split: {result}")
        if run.config.eval.every:
            run.before["validation"] = validate(run, 0)["validation/accuracy"]
    run.log.timer.take()


def finish(run: Run) -> None:
    """Test the best checkpoint once, compare, draw, and say where everything is."""
    log, run_dir, num_problems = run.log, run.log.run_dir, run.config.eval.test_problems
    results, samples, curve = dict(run.before["results"]), {"before": run.before["samples"]}, []
    with log.timer("evaluation"):
        if run.best:
            run.policy.load_state_dict(checkpoint.load_state(checkpoint.best(run_dir))["policy"])
        if num_problems:
            result = evaluate_greedily(run, "test", num_problems)
            results["after"], samples["after"] = result.summary(), samples_of(result)
    if num_problems and run.base_folder:
        results["supervised"], curve = supervised_result(run)
    summary = {f"accuracy_{name}": entry["accuracy"] for name, entry in results.items()}
    summary |= {"best_step": run.best[1] if run.best else run.config.num_steps, "seconds": dict(log.timer.totals)}
    log.write_json("summary.json", summary | {"results": results, "samples": samples, "supervised_curve": curve})
    log.draw_curves(start_accuracy=run.before["validation"], supervised=curve)
    if num_problems:
        log.say("\n" + result_table(results))
    for name, texts in samples.items():
        for text in texts:
            log.say(f"\n{name}: {text['question']} (answer {text['answer']})\n  {text['completion'].strip()!r}")
    log.say(f"\neverything is in {run_dir}: curves.png, metrics.jsonl, summary.json, completions/, checkpoints/")


def samples_of(result: Evaluation, count: int = 2) -> list[dict[str, str]]:
    """The first completions, to look at."""
    texts = [(group.problem, group.completions[0].text) for group in result.groups[:count]]
    return [{"question": problem.question, "answer": problem.answer, "completion": text} for problem, text in texts]


def supervised_result(run: Run) -> tuple[dict, list]:
    """What supervised training alone scores on the same test problems, and its validation curve.

    Where the base was taught a bad habit: the model before it (did GRPO elicit or teach?). Else supervised training
    continued for the seconds that GRPO took (was that time well spent?).
    """
    settings, device, log, curve = run.config.base, run.world.device, run.log, []
    if settings.habit_steps:
        model = load_policy(str(run.base_folder / "before_habit"), precision="fp32", device=device).model
    else:
        seconds = log.timer.training_seconds()
        log.say(f"supervised training, continued for the {seconds:.0f} s that GRPO took")
        options = {"seconds": seconds, "seed": run.config.seed, "device": str(device), "progress": log.progress}
        with log.timer("supervised"):
            go_on = lambda: base.continue_supervised(run.base_folder, settings, run.task, **options)  # noqa: E731
            model, curve = run.world.after_writer("supervised", go_on)
    with log.timer("evaluation"):
        return evaluate_greedily(run, "test", run.config.eval.test_problems, model=model).summary(), curve


def open_run(command: Command, world: World) -> tuple[Path, Path | None]:
    """The run folder, chosen once by rank 0, and the checkpoint that a run in it goes on from."""

    def choose() -> tuple[Path, Path | None]:
        path = Path(command.resume or command.run_dir or checkpoint.default_run_dir(command.config_path.stem))
        is_restart = checkpoint.restarted_by_launcher()
        goes_on = bool(command.resume) or (is_restart and checkpoint.latest(path) is not None)
        checkpoint.open_run_dir(path, resume=bool(command.resume) or is_restart)
        if goes_on:
            list_changes(load(path / "config.yaml"), command.config)
        return path, checkpoint.newest_whole(path) if goes_on else None

    return world.after_writer("run_dir", choose)


def list_changes(before: Config, now: Config) -> None:
    """Say what a run that goes on does differently from here on; ValueError where it cannot."""
    harmless, others = changes(before, now)
    for line in harmless:
        print(f"changed: {line}", flush=True)
    for line in others:
        print(f"CHANGED, and the lost steps are not repeated as they were: {line}", flush=True)


def run_command(command: Command, world: World) -> int:
    """The whole job; the exit status."""
    if world.is_writer:
        print(command.source, flush=True)
    check(command.config, world.size)
    objective = resolve(**asdict(command.config.objective))
    check_steps(objective, command.config.batch.passes * command.config.batch.minibatches)
    trackers.chosen(command.config.track)  # a missing one is found before a run folder is made
    resolved = ObjectiveConfig(preset=command.config.objective.preset, **asdict(objective))
    config = replace(command.config, objective=resolved)
    if command.dry_run:
        if world.is_writer:
            print(dry_run_report(config, world.size, model_facts(config, world.device)))
        return 0
    if config.model.path:
        load_model_config(config.model.path)  # a wrong path is found before a run folder is made
    if config.lora.quantize != "none":
        lora.bitsandbytes()  # and a missing library
    run_dir, goes_on_from = open_run(replace(command, config=config), world)
    run = build(replace(command, config=config), world, run_dir)
    dispatch = {op: choice._asdict() for op, choice in dispatch_table(config.impl, world.device).items()}
    if world.is_writer:
        save(config, run_dir / "config.yaml")
        facts = environment(seed=config.seed, world_size=world.size, dispatch=dispatch)
        run.log.write_json("env.json", facts)
    kernels_used = ", ".join(f"{op}={choice['impl']}" for op, choice in dispatch.items())
    run.log.say(f"run folder {run_dir}; {world.size} x {world.device.type}; kernels: {kernels_used}")
    with run.pool, closing(run.log):
        if goes_on_from:
            load_checkpoint(run, goes_on_from)
        else:
            before_training(run)
        with StopRequest(world, config.distributed.term_grace_s) as stop:
            status = train(run, stop)
        if not status:
            finish(run)
    return status


def main(argv: list[str] | None = None) -> int:
    """Parse, join the other ranks, work; a user's mistake is one line and status 2."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    command = parse_command(sys.argv[1:] if argv is None else argv)
    if command.config.deterministic:
        distributed.make_deterministic()
    world = distributed.start(command.config.distributed.timeout_s)
    try:
        return run_command(command, world)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(
            "\nstopped at once; --resume goes on from the last checkpoint, if there is one", file=sys.stderr, flush=True
        )
        return 130
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
