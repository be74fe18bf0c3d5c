"""Evaluate models on a task: load -> generate -> score -> table, JSON and chart. Nothing is trained here.

    python eval.py --model runs/NAME --model Qwen/Qwen2.5-0.5B --task gsm8k --shots 0 2 4 8 --limit 100
    python eval.py --completions FILE.jsonl --task gsm8k --output scored.jsonl

A model is a run folder (its best checkpoint, else its last), a checkpoint folder, any folder in Hugging Face layout or
PEFT's (adapters, which name their base), or a hub id. All models use the config (style, shots, length) of the first run
folder, overridden by the options below. A single completion is greedy; several are sampled, for pass@k and maj@k.
Random numbers do not depend on batches or ranks, so that results are reproducible. Further models are compared with the
first, problem by problem.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

from transformers.utils import logging as transformers_logging

from grpo import checkpoint, distributed, lora
from grpo.config import Config, DataConfig, RewardsConfig, RolloutConfig, load
from grpo.config_check import outside_intervals, prompt_mistakes
from grpo.distributed import World
from grpo.evaluation import describe_difference, evaluate, result_table
from grpo.live import Progress, can_show, fold, line_width, print_any_text
from grpo.metrics import PhaseTimer, environment
from grpo.records import Scores
from grpo.rewards import score_groups
from grpo.rewards.__main__ import report, score_file
from grpo.rewards.pool import make_pool
from grpo.rollout import EVALUATION, Sampler
from grpo.tasks import TASKS, Task, make_task
from grpo.tasks.prompts import Prompter
from grpo.user_code import with_absolute_path
from kernels import dispatch_table

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p")
PRINTED_LINES = 20  # scored completions that are printed; the file has all


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; {self.prog} --help shows all options", file=sys.stderr, flush=True)
        raise SystemExit(2)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; a mistake exits with status 2."""
    parser = Parser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    models = "run folder, checkpoint folder, model folder or hub id; twice to compare"
    add("--model", action="append", default=[], help=models)
    add("--task", help=f"{', '.join(TASKS)} or file.py:ClassName; default: the task of the run folder")
    add("--completions", help="score the completions of this JSONL file (`completion`, `answer`) instead of generating")
    add("--data.path", "--data", dest="data_path", help="where the task's problems are (see train.py --help)")
    add("--data.subset", dest="subset", help="subset of a hub data set (default: the run's, or the task's)")
    for name in ("prompt", "answer"):
        help_text = f"column of the {name} (task jsonl; default: the run's, or {name})"
        add(f"--data.{name}-column", dest=f"{name}_column", help=help_text)
    left_out = "leave out problems whose prompts leave no room for the completion (default: the run's, or not)"
    add("--data.drop-overlong", dest="drop_overlong", action="store_true", default=None, help=left_out)
    add("--split", choices=("test", "validation", "train"), default="test", help="which problems (default: test)")
    add("--shots", type=int, nargs="+", help="exemplars in the prompt, one evaluation each (default: the run's, or 8)")
    style = "plain text or the chat template (default: the run's, or plain)"
    add("--prompt.style", dest="style", choices=("plain", "chat"), help=style)
    template_help = "for the chat template, such as enable_thinking=false (default: the run's)"
    add("--prompt.template-options", dest="template_options", nargs="+", metavar="NAME=VALUE", help=template_help)
    add("--limit", type=int, help="evaluate the first N problems only")
    add("--samples", type=int, default=1, help="completions of each problem (default: 1, greedy)")
    add("--temperature", type=float, help="default: 0 with one sample, else 1")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1, off)")
    add("--top-k", type=int, default=0, help="keep the k most likely tokens (default: 0, off)")
    add("--min-p", type=float, default=0.0, help="least probability, as a share of the largest (default: 0, off)")
    add("--max-new-tokens", type=int, help="default: the run's, or 400")
    add("--max-sequences", type=int, default=512, help="sequences decoded at a time (default: 512)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--impl", choices=("auto", "torch", "triton"), default="auto", help="kernels (default: auto)")
    precision = "default: the run's, or bf16 on CUDA and fp32 elsewhere (auto)"
    add("--precision", choices=("auto", "fp32", "bf16"), help=precision)
    output = "JSON file of results, the chart next to it (default: runs/eval-TASK-TIME.json); with --completions, JSONL"
    add("--output", help=output)
    options = parser.parse_args(argv)
    if bool(options.model) == bool(options.completions):
        parser.error("name either --model (to generate) or --completions FILE.jsonl (to score)")
    if options.completions and not (options.task and options.output):
        parser.error("--completions needs --task and --output FILE.jsonl")
    if options.samples < 1 or (options.limit is not None and options.limit < 1):
        parser.error(f"--samples {options.samples} and --limit {options.limit} must be 1 or more")
    if options.shots and min(options.shots) < 0:
        parser.error(f"--shots {min(options.shots)} must be 0 or more")
    if options.temperature is None:
        options.temperature = 0.0 if options.samples == 1 else 1.0
    if options.samples > 1 and options.temperature == 0:
        parser.error(f"--samples {options.samples} with --temperature 0: all would be equal; use a temperature above 0")
    return options


def resolve_model(name: str) -> tuple[str, Config | None]:
    """The folder or hub id to load, and the config of the run that it belongs to, if any."""
    folder, run = checkpoint.model_folder(name)
    return (str(folder), load(run / "config.yaml")) if run else (name, None)


def settings_of(options: argparse.Namespace) -> tuple[list[str], Config]:
    """Model paths, and the config to evaluate with: the first run's, overridden by the command line."""
    resolved = [resolve_model(name) for name in options.model]
    run = next((config for _, config in resolved if config), None)
    if run is None and not options.task:
        absent = [name for name in options.model if not Path(name).expanduser().is_dir()]
        found = f" (there is no folder {', '.join(absent)})" if absent else ""
        message = f"--task is missing, and no model is a run folder, which would name it{found}"
        raise ValueError(f"{message}; pass --task gsm8k, for example")
    config = run or Config(rollout=RolloutConfig(max_new_tokens=400))
    if options.task and with_absolute_path(options.task) != config.task:
        names = ("functions", "weights", "format_weight", "correctness_weight")  # they belong to the run's own task
        rewards = replace(config.rewards, **{name: getattr(RewardsConfig(), name) for name in names})
        config = replace(config, task=options.task, data=DataConfig(), rewards=rewards)
    data = {name: getattr(options, name) for name in ("subset", "prompt_column", "answer_column", "drop_overlong")}
    template_options = options.template_options and tuple(options.template_options)
    given = {
        "data": {"path": options.data_path, **data},
        "prompt": {"style": options.style, "template_options": template_options},
        "rollout": {
            "group_size": options.samples,
            "max_sequences": max(options.max_sequences, options.samples),
            **{name: getattr(options, name) for name in ("max_new_tokens", *SAMPLING_OPTIONS)},
        },
        "model": {"precision": options.precision},
    }
    for section, values in given.items():
        stated = {name: value for name, value in values.items() if value is not None}
        config = replace(config, **{section: replace(getattr(config, section), **stated)})
    # A run's own options are ignored with another style.
    wrong_options = prompt_mistakes(config.prompt) if template_options else ()
    for mistake in (*outside_intervals(config.rollout, "rollout."), *wrong_options):
        raise ValueError(mistake)
    return [path for path, _ in resolved], config


def shots_label(shots: int) -> str:
    """0 shots, 1 shot, 2 shots."""
    return f"{shots} shot{'s'[: shots != 1]}"


def evaluate_model(
    name: str,
    path: str,
    options: argparse.Namespace,
    config: Config,
    task: Task,
    world: World,
    score: Callable[..., Scores],
) -> dict[int, dict]:
    """Evaluate one model; returns its summary by number of shots."""
    timer = PhaseTimer(Progress(world.is_writer and can_show()))
    policy = lora.load(path, precision=config.model.precision, device=world.device)
    chosen = islice(task.split(options.split), options.limit)
    problems = [replace(problem, index=i) for i, problem in enumerate(chosen)]
    lengths = {"context_length": policy.context_length, "max_new_tokens": config.rollout.max_new_tokens}
    prompters = {
        shots: Prompter(task, replace(config.prompt, shots=shots), policy.tokenizer, **lengths)
        for shots in options.shots or [config.prompt.shots]
    }
    say = print if world.is_writer else lambda text: None
    for prompter in prompters.values() if config.data.drop_overlong else ():  # the same problems for all shots
        problems = prompter.fitting(problems, drop=True, say=say)
    prompted = {shots: prompter.ask(problems) for shots, prompter in prompters.items()}
    results = {}
    for shots, questions in prompted.items():
        how = {"stop": prompters[shots].stop_strings, "stream": EVALUATION, "seed": options.seed}
        how |= {"impl": options.impl, "progress": timer.progress}
        sampler = Sampler(policy.model, policy.tokenizer, config.rollout, **how)
        with timer(f"{Path(name).name or name}, {shots_label(shots)}"):
            results[shots] = evaluate(sampler, questions, score, world=world).summary()
    return results


def draw_chart(results: dict[str, dict[int, dict]], path: Path) -> None:
    """A bar chart of accuracy by number of shots, one bar per model, with 95 % intervals."""
    from matplotlib.figure import Figure

    widest = max(map(len, results.values()))
    inches = max(4, 1.5 + 1.6 * widest * len(results) ** 0.5, 1 + 0.09 * max(map(len, results)))
    figure = Figure(figsize=(inches, 4 + 0.2 * len(results)), layout="constrained")  # the legend is above the bars
    axes = figure.subplots()
    width = 0.8 / len(results)
    for i, (model, by_shots) in enumerate(results.items()):
        places = [place + (i - (len(results) - 1) / 2) * width for place in range(len(by_shots))]
        heights = [entry["accuracy"] for entry in by_shots.values()]
        below = [entry["accuracy"] - entry["interval"][0] for entry in by_shots.values()]
        above = [entry["interval"][1] - entry["accuracy"] for entry in by_shots.values()]
        bars = axes.bar(places, heights, width, yerr=[below, above], capsize=3, label=model)
        axes.bar_label(bars, [f"{height:.0%}" for height in heights], padding=3)
    first = next(iter(results.values()))
    axes.set(xticks=range(len(first)), xticklabels=map(shots_label, first), ylabel="accuracy")
    axes.set(yticks=[0, 0.25, 0.5, 0.75, 1], ylim=(0, 1.1), xlim=(-0.6, len(first) - 0.4))
    axes.set_title(f"{next(iter(first.values()))['problems']:,} problems, 95 % intervals", fontsize="medium")
    axes.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside upper left", frameon=False)
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace, world: World) -> None:
    """Evaluate every model; rank 0 prints the table and writes the JSON and the chart."""
    paths, config = world.run_on_writer("settings", lambda: settings_of(options))
    task = make_task(config.task, config.data, config.rewards)
    if getattr(task.split(options.split), "endless", False) and options.limit is None:
        raise ValueError(f"--split {options.split} of task {task.name!r} is endless; say how much of it: --limit 200")
    output = Path(options.output or f"runs/eval-{Path(config.task).stem}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    # Fail now, not after hours, if the output cannot be written.
    if output.is_dir() or output.suffix == ".png":
        raise ValueError(f"--output {output} is a folder or the chart's own name; name a file such as results.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    if world.is_writer and not output.exists():
        output.touch()
        output.unlink()
    loaded, results = dict(zip(options.model, paths, strict=True)), {}
    dispatch = {op: choice.impl for op, choice in dispatch_table(options.impl, world.device).items()}
    record = {"task": config.task, "split": options.split, "max_new_tokens": config.rollout.max_new_tokens}
    record |= {name: getattr(options, name) for name in SAMPLING_OPTIONS}
    record |= {"loaded": loaded, "models": results}
    record["environment"] = environment(seed=options.seed, world_size=world.size, dispatch=dispatch)
    with make_pool(config.rewards) as pool:
        scoring = {"require_finish": config.rewards.require_finish, "score": pool}
        score = partial(score_groups, rewards=task.rewards, **scoring)
        for name, path in loaded.items():
            results[name] = evaluate_model(name, path, options, config, task, world, score)
            if world.is_writer:  # after each model: its results survive if a later one fails
                output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not world.is_writer:
        return
    named = ((name, *item) for name, by_shots in results.items() for item in by_shots.items())
    rows = {f"{name}, {shots_label(shots)}": entry for name, shots, entry in named}
    print(result_table(rows, line_width()))
    first, *others = results
    for name in others:
        for shots, entry in results[name].items():
            difference = describe_difference(name, entry, first, results[first][shots])
            print(fold(f"{shots_label(shots)}: {difference}", line_width()))
    print(f"written: {output}")
    try:
        draw_chart(results, output.with_suffix(".png"))
        print(f"written: {output.with_suffix('.png')}")
    except ModuleNotFoundError as error:
        print(f"the chart is not drawn: {error.name} is not installed (pip install matplotlib)")


def score_completions(options: argparse.Namespace) -> None:
    """Score the completions of a file; no model and no data is loaded."""
    config = Config()
    task = make_task(options.task, DataConfig(path=options.data_path or ""), config.rewards)
    source, output, require_finish = Path(options.completions), Path(options.output), config.rewards.require_finish
    with make_pool(config.rewards) as pool:
        rows = score_file(task.rewards, source, output, require_finish=require_finish, score=pool)
    for number, record in enumerate(rows[:PRINTED_LINES], 1):
        components = "  ".join(f"{name} {value}" for name, value in record["rewards"].items())
        print(f"{number}: {components}  reward {record['reward']}  {record['status']}")
    print(report(rows, options.output))


def main(argv: list[str] | None = None) -> int:
    """Score completions or evaluate models. Returns the exit status: 2, after one line, for a mistake of the user's."""
    options = parse(sys.argv[1:] if argv is None else argv)
    print_any_text()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if options.completions:
            score_completions(options)
        else:
            run(options, distributed.start())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
