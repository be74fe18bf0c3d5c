"""The results of a run: test accuracy before and after it, supervised training of the same base for comparison,
summary.json, curves.png and the final report. Called by train.py before the first step and after the last."""

from __future__ import annotations

from grpo import base, checkpoint
from grpo.evaluation import Evaluation, describe_difference, result_table
from grpo.metrics import comparison_name, training_seconds
from grpo.policy import load_policy
from grpo.run import Run, evaluate_greedily, validate


def before_training(run: Run) -> None:
    """Test and validation accuracy of the model before training, kept in run.before."""
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
    """Test the best checkpoint once, compare with before, draw the curves, and print the results and where they are."""
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
        comparison = comparison_name(run.config.base.habit_steps)
        rows = {comparison if name == "supervised" else name: row for name, row in results.items()}
        log.say("\n" + result_table(rows, log.width))
        before, after = results.get("before", {}), results["after"]
        if len(before.get("correct", ())) == len(after["correct"]):  # not after a resume with other test_problems
            log.say(describe_difference("after", after, "before", before))
    for name, texts in samples.items():
        for text in texts:
            log.say(f"\n{name}: {text['question']} (answer {text['answer']})\n  {text['completion'].strip()!r}")
    made = ("curves.png", "metrics.jsonl", "summary.json", "completions/", "checkpoints/")  # the first needs matplotlib
    log.say(f"\neverything is in {run_dir}: {', '.join(name for name in made if (run_dir / name).exists())}")
    log.say(f"to view it in a browser: python -m grpo.report {run_dir}")


def samples_of(result: Evaluation, count: int = 2) -> list[dict[str, str]]:
    """The first completions, for a person to read."""
    texts = [(group.problem, group.completions[0].text) for group in result.groups[:count]]
    return [{"question": problem.question, "answer": problem.answer, "completion": text} for problem, text in texts]


def supervised_result(run: Run) -> tuple[dict, list]:
    """Test summary of a supervised model on the same problems, and its validation curve, for comparison with GRPO.

    If the base was taught a bad habit (base.habit_steps): the model before that phase (did GRPO elicit or teach?). Else
    supervised training continued for as many seconds as GRPO took (was that time well spent?).
    """
    settings, device, log, curve = run.config.base, run.world.device, run.log, []
    if settings.habit_steps:
        model = load_policy(str(run.base_folder / "before_habit"), precision="fp32", device=device).model
    else:
        seconds = training_seconds(log.timer.totals)
        log.say(f"continuing supervised training for {seconds:.0f} s, as long as GRPO trained")
        options = {"seconds": seconds, "seed": run.config.seed, "device": str(device), "progress": log.progress}
        with log.timer("supervised"):
            continue_training = lambda: base.continue_supervised(run.base_folder, settings, run.task, **options)
            model, curve = run.world.run_on_writer("supervised", continue_training)
    with log.timer("evaluation"):
        return evaluate_greedily(run, "test", run.config.eval.test_problems, model=model).summary(), curve
