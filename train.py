"""Train a language model with GRPO: build the run, repeat the training step, report the result.

    python train.py                                       the embedded demo, or GSM8K where there is a CUDA device
    torchrun --nproc_per_node=8 train.py --config FILE    the same over 8 ranks

Read `train_step` first: it calls the modules of grpo/ in the order in which data flows through them; the maths and the
tensor indexing are there. grpo/run.py builds and saves a run, grpo/results.py makes its final report.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict, replace

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from grpo import distributed
from grpo.advantages import (
    nonzero_groups_first,
    normalise,
    overlong_penalty,
    zero_advantage_groups,
    zero_advantage_share,
)
from grpo.batch import correct_mismatch, counted_completions, keep_high_entropy, kl_per_completion, pack, weigh
from grpo.command_line import Command, parse_command
from grpo.distributed import StopRequest, World
from grpo.dry_run import dry_run_report, model_facts
from grpo.evaluation import CORRECTNESS
from grpo.first_batch import check_first_batch
from grpo.live import print_any_text
from grpo.metrics import GROUPS_WITH_TOKENS, completion_lines, length_metrics, training_seconds
from grpo.records import Batch, Group, Scores, join_scores, merge_scores
from grpo.results import before_training, finish
from grpo.rewards import refuse_unscored
from grpo.run import Run, describe, load_checkpoint, open_run, resolve_config, save_checkpoint, validate
from grpo.update import fill_frozen, learning_rate, update_policy


def train_step(run: Run, step: int) -> dict[str, float]:
    """One rollout and the optimizer steps on it. Returns the metrics of this step; steps count from 1."""
    groups, drawn, drawn_advantages = draw(run, step)
    used = nonzero_groups_first(drawn_advantages, run.config.rollout.prompts_per_step)
    groups, scores = pick(run, groups, used), drawn.pick(used)
    with run.log.timer("update"):
        advantages, metrics = learn(run, step, groups, scores)
    log_completions(run, step, groups, scores, advantages)
    draw_metrics = {"zero_spread_groups": zero_advantage_share(drawn_advantages)}
    draw_metrics |= {"groups_dropped": 1 - len(used) / len(drawn_advantages), **run.stream.metrics()}
    draw_metrics |= length_metrics(drawn, training_seconds(run.log.timer.recent))
    return {**drawn.means(), **draw_metrics, **metrics}


def draw(run: Run, step: int) -> tuple[list[Group], Scores, Tensor]:
    """Sample and score prompts_per_step groups; with dynamic sampling, again until so many have unequal rewards.

    Returns this rank's groups, and the scores and advantages ([P, G]) of all ranks' groups. Groups that are drawn but
    not used are discarded: in a later step they would be off-policy.
    """
    config, world, timer, objective = run.config, run.world, run.log.timer, run.updater.objective
    groups, scores = [], []
    for _ in range(objective.max_draws if objective.dynamic_sampling else 1):
        with timer("rollout"):
            problems = world.local_share(run.stream.take(config.rollout.prompts_per_step))
            with run.policy.weights_loaded():
                new = run.sampler.generate(run.prompter.ask(problems), step)
            groups += new
            world.barrier()  # waiting for the slowest rank counts as rollout time, not as scoring
        with timer("score"):
            scores.append(merge_scores(world.gather(run.score(new))))
            refuse_unscored(scores[-1], config.rewards.max_unscored)
            run.stream.remember(scores[-1].pass_rates(CORRECTNESS))
        drawn = join_scores(scores)
        advantages = compute_advantages(run, drawn)
        if (~zero_advantage_groups(advantages)).sum() >= config.rollout.prompts_per_step:
            break
    return groups, drawn, advantages


def pick(run: Run, groups: list[Group], used: list[int]) -> list[Group]:
    """This rank's share of the groups at `used`, indices into those of all ranks. groups: its share of all drawn."""
    if len(used) == len(groups) * run.world.size:
        return groups
    return run.world.redistribute(groups, used)


def learn(run: Run, step: int, groups: list[Group], scores: Scores) -> tuple[Tensor, dict[str, float]]:
    """Advantages, token weights and the optimizer steps of one rollout. groups: this rank's; scores: all ranks'.

    Returns all ranks' advantages, [P, G], and metrics. `draw`'s own only choose the groups: they ignore penalties.
    """
    config, world, objective = run.config, run.world, run.updater.objective
    if step == run.first_step:
        with run.policy.weights_loaded():
            run.log.say(check_first_batch(run.module, groups, world.device, run.layout))
    penalty = overlong_penalty(scores.lengths, config.rollout.max_new_tokens, objective.overlong_share)
    advantages = compute_advantages(run, scores, penalty)
    is_zero = world.local_share(zero_advantage_groups(advantages)).tolist()
    skipped = None if objective.needs_zero_advantage_groups else is_zero
    layout = asdict(config.batch) | {"layout": run.layout, "tokens_per_micro_batch": run.updater.token_budget}
    batch = pack(groups, **layout, skipped=skipped, max_over_ranks=world.max, device=world.device)
    fill_frozen(run.updater, batch, run.module, run.reference)
    if objective.kl_in_reward:
        advantages = compute_advantages(run, scores, penalty - kl_penalty(run, batch))
    set_token_weights(run, batch, groups, advantages, scores.scored)
    torch.manual_seed(hash((config.seed, step, world.rank)))  # so that a resumed run repeats its dropout
    lr = learning_rate(step, config.optim, config.num_steps)
    metrics = update_policy(run.updater, batch, step=step, lr=lr, progress=run.log.progress)
    if run.moving_reference and step % objective.ref_refresh_every == 0:
        run.moving_reference.follow(run.policy, objective.ref_mix)
    if objective.overlong_share:
        metrics["overlong_penalty"] = penalty.mean().item()
    return advantages, metrics | {"lr": lr}


def compute_advantages(run: Run, scores: Scores, penalty: Tensor | float = 0.0) -> Tensor:
    """Advantages of all ranks' groups, [P, G], from their total rewards plus `penalty` ([P, G] or a number)."""
    by_component = {"components": scores.components, "weights": scores.weights}
    return normalise(run.updater.objective.advantages, scores.total + penalty, scores.scored, **by_component)


def kl_penalty(run: Run, batch: Batch) -> Tensor:
    """beta * KL estimate, summed over each completion, to be subtracted from its reward: [P, G], of all ranks."""
    local = kl_per_completion(batch)
    return run.updater.objective.beta * torch.stack(run.world.gather_interleaved(list(local)))


def set_token_weights(run: Run, batch: Batch, groups: list[Group], advantages: Tensor, scored: Tensor) -> None:
    """Write each token's advantage and final weight into the batch: aggregation, then masks and corrections."""
    objective, world = run.updater.objective, run.world
    counted = counted_completions(groups, world.local_share(scored), mask_truncated=objective.mask_truncated)
    weigh(
        batch,
        world.local_share(advantages),
        counted,
        aggregation=objective.aggregation,
        max_new_tokens=run.config.rollout.max_new_tokens,
        sum_over_ranks=world.sum,
    )
    if objective.entropy_share < 1:
        keep_high_entropy(batch, objective.entropy_share, world.gather)
    if objective.mismatch != "none":
        correct_mismatch(batch, objective.mismatch, level=objective.mismatch_level, cap=objective.mismatch_cap)


def log_completions(run: Run, step: int, groups: list[Group], scores: Scores, advantages: Tensor) -> None:
    """Each rank formats its own groups, rank 0 writes them. groups: this rank's; scores, advantages: all ranks'."""
    world, wanted = run.world, run.config.log_groups
    if wanted == 0:
        return
    local = list(world.local_share(range(len(advantages))[:wanted]))
    num_with_tokens = len(world.local_share(range(GROUPS_WITH_TOKENS)))
    facts = (scores.pick(local), advantages[local], run.token_text)
    lines = completion_lines(groups[: len(local)], *facts, num_with_tokens=num_with_tokens)
    run.log.log_completions(step, world.gather_interleaved(lines))


def train(run: Run, stop: StopRequest) -> int:
    """Run the steps that are left, validating and saving when due. Returns the exit status: 0 unless a signal came."""
    config, log, status = run.config, run.log, 0
    for step in range(run.first_step, config.num_steps + 1):
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
            break
    run.world.run_on_writer("written", run.writer.wait)  # every rank reads the best checkpoint next
    if status:
        log.say(f"\nstopped after step {step}; resume with: python train.py --resume {log.run_dir}")
    return status


def run_command(command: Command, world: World) -> int:
    """Resolve the config, then print the dry run or train. Returns the exit status."""
    if world.is_writer:
        print(command.source, flush=True)
    config, objective = resolve_config(command.config, world)
    if command.dry_run:
        if world.is_writer:
            print(dry_run_report(config, world.size, model_facts(config, world.device)))
        return 0
    run_dir, resume_from = open_run(replace(command, config=config), world)
    run = Run(config, objective, world, run_dir)
    with run.pool, closing(run.log), world.naming_missing_ranks():
        if resume_from:
            load_checkpoint(run, resume_from)
        describe(run)
        if not resume_from:
            before_training(run)
        with StopRequest(world, config.distributed.term_grace_s) as stop:
            status = train(run, stop)
        if not status:
            finish(run)
    return status


def main(argv: list[str] | None = None) -> int:
    """Parse, join the process group, run. Returns the exit status: 2, after one line, for a mistake of the user's."""
    print_any_text()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    command = parse_command(sys.argv[1:] if argv is None else argv)
    if command.config.deterministic:
        distributed.make_deterministic()
    try:
        return run_command(command, distributed.start(command.config.distributed.timeout_s))
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        message = "stopped immediately; --resume continues from the last checkpoint, if there is one"
        print(f"\n{message}", file=sys.stderr, flush=True)
        return 130
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
