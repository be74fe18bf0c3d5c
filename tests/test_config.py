"""The config: typed both ways, mistakes named with the remedy, every field in the help."""

import copy
import math
import re
import typing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from grpo import command_line, dry_run
from grpo import config as config_module
from grpo.command_line import parse_command
from grpo.config import Config, ObjectiveConfig, dump, flat, from_dict, known_keys, load, save
from grpo.config_check import FIXED, FREE, changes, check
from grpo.objectives import resolve
from grpo.rollout import slab

ROOT = Path(__file__).parents[1]
DEFAULTS = flat(asdict(Config()))
SIZES = {"num_hidden_layers": 2, "num_key_value_heads": 2}
FACTS = dry_run.ModelFacts(
    num_parameters=1000,
    num_trained=1000,
    num_in_4_bits=0,
    num_in_layers=600,
    shape=Qwen2Config(**SIZES, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=100),
    bytes_per_element=2,
    has_reference=True,
    prompt_tokens=10,
    logit_chunk_tokens=16,
)


def changed(key: str, value: object) -> Config:
    """The default config with one dotted key set, past every type check."""
    section, _, name = key.rpartition(".")
    return replace(
        Config(), **({section: replace(getattr(Config(), section), **{name: value})} if section else {name: value})
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- YAML ---


def test_what_is_saved_is_loaded_again_with_types(tmp_path):
    config = changed("optim.betas", (0.8, 0.95))
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == set(asdict(Config()))


def test_yaml_may_write_floats_without_a_point_and_tuples_as_lists(tmp_path):
    config = load(write(tmp_path / "a.yaml", "optim: {lr: 1e-6, betas: [0, 0.5], warmup: 0}\nobjective: {beta: null}"))
    assert config.optim.lr == 1e-6 and type(config.optim.lr) is float
    assert config.optim.betas == (0.0, 0.5)
    assert type(config.optim.warmup) is float
    assert config.objective.beta is None


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load(write(tmp_path / "a.yaml", "# nothing\n")) == Config()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optim": {"lrr": 1}}, "unknown key optim.lrr; the nearest is optim.lr$"),
        ({"lr": 1}, "unknown key lr; the nearest is optim.lr$"),
        ({"optin": {"lr": 1}}, "unknown key optin; the nearest is optim$"),
        ({"zzzzqqq": 1}, "unknown key zzzzqqq$"),
        ({"base": {"lrr": 1}}, "unknown key base.lrr; the nearest is base.lr$"),
        ({"learning_rate": 1}, "unknown key learning_rate; the nearest is optim.lr$"),
        (
            {"rollout": {"num_generations": 8}},
            "unknown key rollout.num_generations; the nearest is rollout.group_size$",
        ),
        ({"model": {"dtype": "bf16"}}, "unknown key model.dtype; the nearest is model.precision$"),
        ({"lora": {"r": 16}}, "unknown key lora.r; the nearest is lora.rank$"),
        ({"epsilon_high": 0.28}, "unknown key epsilon_high; the nearest is objective.clip_high$"),
        ({"num_steps": 1.5}, "num_steps=1.5 is float; expected int$"),
        ({"num_steps": True}, "num_steps=True is bool; expected int$"),
        ({"rewards": {"require_finish": 1}}, "rewards.require_finish=1 is int; expected bool$"),
        ({"optim": {"lr": "fast"}}, "optim.lr='fast' is str; expected float$"),
        ({"optim": {"betas": [0.9]}}, r"optim.betas=\[0.9\] is list; expected a list of 2$"),
        ({"rewards": {"functions": "a.py:f"}}, "rewards.functions=.a.py:f. is str; expected a list$"),
        ({"optim": 3}, "optim=3 is not a section"),
        ({"model": {"precision": "fp8"}}, "model.precision='fp8' is str; expected one of 'auto', 'fp32', 'bf16'$"),
        ({"objective": {"beta": "x"}}, "objective.beta='x' is str; expected float$"),
        ([1], r"config=\[1\] is not a section"),
    ],
)
def test_a_wrong_key_or_type_is_named_with_what_was_expected(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path):
    text = "optim: &slow {lr: 0.5}\nbase: {<<: *slow, lr: 0.25}\nseed: 1\nnum_steps: 2\nseed: 3\n"
    with pytest.raises(ValueError, match="a.yaml: line 5: duplicate key seed; keep one"):
        load(write(tmp_path / "a.yaml", text))
    config = load(write(tmp_path / "a.yaml", text.removesuffix("seed: 3\n")))
    assert (config.optim.lr, config.base.lr, config.seed) == (0.5, 0.25, 1)  # a merged key is no second one


def test_a_syntax_error_is_one_line_with_file_and_line(tmp_path):
    for text, reason in (("seed: 1\noptim: {lr: 1\nseed: [\n", "line 3: expected ',' or '}'"), ("a: \1", "unaccept.*")):
        with pytest.raises(ValueError, match=f"a.yaml: {reason}") as refused:
            load(write(tmp_path / "a.yaml", text))
        assert "\n" not in str(refused.value)


def test_a_key_of_another_version_in_a_runs_config_is_told_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="unknown key magic; if another version wrote it, remove the line$"):
        load(write(tmp_path / "config.yaml", "magic: 1"))
    with pytest.raises(ValueError, match="unknown key magic$"):
        load(write(tmp_path / "mine.yaml", "magic: 1"))


def test_every_name_of_another_trainer_stands_for_a_key_of_ours():
    assert set(config_module.OTHER_NAMES.values()) <= set(known_keys())


def test_an_error_names_the_file(tmp_path):
    for text in ("optim: {lrr: 1}", "a: [1"):
        with pytest.raises(ValueError, match="a.yaml: "):
            load(write(tmp_path / "a.yaml", text))
    with pytest.raises(
        ValueError, match=r"cannot read config .*none.yaml: No such file.*there are: .*configs/gsm8k.yaml"
    ):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_passes_the_check_on_1_2_4_and_8_ranks(path):
    for world_size in (1, 2, 4, 8):
        check(load(path), world_size)


def test_gsm8k_has_the_promised_defaults():
    config = load(ROOT / "configs" / "gsm8k.yaml")
    assert (config.task, config.model.path) == ("gsm8k", "Qwen/Qwen2.5-0.5B")
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.rollout.max_new_tokens) == (64, 16, 400)
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup) == (1e-6, "cosine", 0.1)
    assert (config.eval.every, config.eval.validation_problems) == (20, 200)


def test_gsm8k_lora_has_the_promised_defaults():
    config = load(ROOT / "configs" / "gsm8k_lora.yaml")
    assert (config.lora.rank, config.lora.alpha, len(config.lora.target_modules)) == (16, 16.0, 7)
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.rollout.max_new_tokens) == (32, 8, 400)
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup) == (2e-5, "cosine", 0.1)
    assert replace(config, lora=Config().lora, rollout=Config().rollout, optim=Config().optim) == replace(
        load(ROOT / "configs" / "gsm8k.yaml"), rollout=Config().rollout, optim=Config().optim
    )


# --- the command line ---


@pytest.fixture
def yaml_path(tmp_path):
    return str(write(tmp_path / "base.yaml", "num_steps: 7\noptim: {lr: 0.5}\n"))


def test_options_override_the_file_which_overrides_the_defaults(yaml_path):
    line = (
        f"--config {yaml_path} --optim.lr 5e-6 --rollout.group-size=4 --rewards.no-require-finish --optim.betas 0 0.5"
    )
    command = parse_command(line.split())
    assert command.config.num_steps == 7
    assert command.config.optim == replace(Config().optim, lr=5e-6, betas=(0.0, 0.5))
    assert command.config.rollout.group_size == 4
    assert command.config.rewards.require_finish is False
    assert command.config.seed == Config().seed


def test_a_switch_that_may_be_none_takes_its_value_in_either_case(yaml_path):
    options = "--objective.dynamic-sampling true --seed 5 --objective.kl_corrected=false --num-steps 9"
    options += " --model.compile True --objective.mask-truncated=none"
    command = parse_command(["--config", yaml_path, *options.split()])
    objective = command.config.objective
    assert (objective.dynamic_sampling, objective.kl_corrected, objective.mask_truncated) == (True, False, None)
    assert command.config.model.compile is True and (command.config.seed, command.config.num_steps) == (5, 9)


def test_dashes_and_underscores_are_the_same(yaml_path):
    for option in ("--num-steps", "--num_steps"):
        assert parse_command(["--config", yaml_path, option, "3"]).config.num_steps == 3
    for option in ("--run-dir", "--run_dir"):
        assert parse_command(["--config", yaml_path, option, "x"]).run_dir == "x"


def test_the_options_that_scripts_rely_on(yaml_path):
    line = f"--config {yaml_path} --run-dir DIR --seed 3 --num-steps 6 --save-every 2 --preset dr_grpo --dry-run"
    command = parse_command(line.split())
    assert (command.run_dir, command.resume, command.dry_run) == ("DIR", None, True)
    assert (command.config.seed, command.config.num_steps, command.config.save_every) == (3, 6, 2)
    assert command.config.objective.preset == "dr_grpo"
    assert (command.config_path, command.source) == (Path(yaml_path), f"config: {yaml_path}, given by --config")


@pytest.mark.parametrize(
    "has_cuda, name, reason", [(True, "gsm8k", "is a CUDA device"), (False, "demo", "is no CUDA device")]
)
def test_without_a_config_the_hardware_decides_and_the_source_says_so(monkeypatch, has_cuda, name, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    command = parse_command([])
    assert command.config == load(ROOT / "configs" / f"{name}.yaml")
    assert command.source.startswith(f"config: configs/{name}.yaml, because ") and reason in command.source


def test_a_resumed_run_keeps_its_config(tmp_path):
    save(changed("num_steps", 9), tmp_path / "config.yaml")
    command = parse_command(["--resume", str(tmp_path), "--save-every", "4"])
    assert (command.config.num_steps, command.config.save_every, command.resume) == (9, 4, str(tmp_path))


@pytest.mark.parametrize("option", ["--preset=dapo", "--objective.preset=dapo"])
def test_a_preset_over_a_config_that_states_its_whole_objective_is_refused(tmp_path, option, capsys):
    stated = replace(Config(), objective=ObjectiveConfig(preset="grpo", **asdict(resolve("grpo"))))
    save(stated, tmp_path / "config.yaml")
    assert parse_command(["--resume", str(tmp_path), "--objective.beta=0"]).config.objective.beta == 0
    for command in (["--resume", str(tmp_path)], ["--config", str(tmp_path / "config.yaml")]):
        with pytest.raises(SystemExit):
            parse_command([*command, option])
        assert "objective.preset=dapo changes nothing" in capsys.readouterr().err


def test_a_run_resumes_in_its_own_folder_alone(tmp_path, capsys):
    save(Config(), tmp_path / "config.yaml")
    with pytest.raises(SystemExit):
        parse_command(["--resume", str(tmp_path), "--run_dir", "elsewhere"])
    assert "--run-dir elsewhere with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ("--optim.lrr 3", "unknown option --optim.lrr; the nearest is --optim.lr;"),
        ("--model Qwen/Qwen2.5-0.5B", "unknown option --model; the nearest is --model.path;"),
        ("--num-stpes=3", "unknown option --num-stpes=3; the nearest is --num-steps;"),
        ("--rundir x", "unknown option --rundir; the nearest is --run-dir;"),
        ("--lr 3", "unknown option --lr; the nearest is --optim.lr;"),
        ("--group_size 3", "unknown option --group_size; the nearest is --rollout.group-size;"),
        ("--optim.learning-rate 1", "unknown option --optim.learning-rate; the nearest is --optim.lr;"),
        (
            "--max_completion_length=9",
            "unknown option --max_completion_length=9; the nearest is --rollout.max-new-tokens;",
        ),
        (
            "--objective.dynamic-sampling",
            "--objective.dynamic-sampling takes a value; use --.*dynamic-sampling True or Fa",
        ),
        ("--model.compile --seed 1", "--model.compile takes a value; use --model.compile True or False"),
        ("surplus", "unknown option surplus; --help shows them all"),
        ("true", "unknown option true; --help shows them all"),
        (
            "--rollout.cuda-graph=true",
            "--rollout.cuda-graph takes no value, found 'true'; use --rollout.cuda-graph or --rollout.no-cuda-graph",
        ),
        ("--deterministic False", "--deterministic takes no value, found 'False'; use --deterministic or --no-determ"),
        ("--resume nowhere", "--config .* with --resume: the run has its own config"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_nearest_and_exit_status_2(yaml_path, line, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command(["--config", yaml_path, *line.split()])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert re.match(f"error: {message}", printed.err) and printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("line", ["--num-steps many", "--num-steps", "--model.precision fp8", "--config"])
def test_a_wrong_value_exits_with_status_2_too(yaml_path, line, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command([*line.split(), *([] if line == "--config" else ["--config", yaml_path])])
    assert ended.value.code == 2


def test_resuming_what_is_no_run_folder_is_refused(tmp_path, capsys):
    for prepare in (lambda path: None, Path.touch):  # the second as of a run that was killed at once
        prepare(tmp_path / "config.yaml")
        with pytest.raises(SystemExit):
            parse_command(["--resume", str(tmp_path)])
        assert "no config.yaml there; name a run folder" in capsys.readouterr().err


def docstrings() -> dict[str, str]:
    """Every option's docstring, read from the source: the line after its field."""
    found, section = {}, None
    sections = {
        type(getattr(Config(), name)).__name__: f"{name}."
        for name in asdict(Config())
        if "Config" in type(getattr(Config(), name)).__name__
    }
    files = (config_module, command_line)
    lines = [line for module in files for line in Path(module.__file__).read_text().splitlines()]
    for line, following in zip(lines, lines[1:], strict=False):
        if declared := re.match(r"class (\w+)", line):
            section = sections.get(declared[1], "" if declared[1] in ("Config", "RunOptions") else None)
        field = re.match(r"    (\w+): ", line)
        text = re.match(r'    """(.*)"""$', following)
        if section is not None and field and text:
            found[section + field[1]] = text[1]
    return found


def test_the_help_shows_every_option_with_its_docstring_and_its_default(yaml_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        parse_command(["--config", yaml_path, "--help"])
    assert ended.value.code == 0
    shown = " ".join(re.sub(r"[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    documented = docstrings()
    assert set(documented) >= set(known_keys()), f"without a docstring: {set(known_keys()) - set(documented)}"
    for key, text in documented.items():
        assert f"--{key.replace('_', '-')}" in shown
        assert text[:40] in shown, key
    assert "Every option below --preset is a key of the config." in shown
    assert list(typing.get_type_hints(command_line.RunOptions))[-1] == "preset"
    assert "Training steps: rollouts. (default: 7)" in shown, "the file's value is the default"
    assert "Peak learning rate of AdamW. (default: 0.5)" in shown


# --- the check ---


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("rollout.prompts_per_step", 30, "rollout.prompts_per_step=30 is not divisible by world_size=8; use 24 or 32"),
        ("rollout.prompts_per_step", 4, "prompts_per_step=4 is not divisible by world_size=8; use 8$"),
        ("batch.minibatches", 3, "prompts_per_step=16 is not divisible by batch.minibatches=3; use 24$"),
        ("batch.minibatches", 4, r"is not divisible by batch.minibatches \* world_size=32; use 32"),
        ("rollout.prompts_per_step", 0, r"rollout.prompts_per_step=0 is outside \[1, inf\)"),
        ("batch.minibatches", 0, r"batch.minibatches=0 is outside \[1, inf\)"),
        ("base.num_heads", 0, r"base.num_heads=0 is outside \[1, inf\)"),
        ("rollout.group_size", 1, "rollout.group_size=1: .* use 2 or more"),
        ("base.hidden_size", 124, r"base.hidden_size=124 is not divisible by 2 \* base.num_heads=8; use 128"),
        ("rollout.max_sequences", 7, "max_sequences=7 is less than rollout.group_size=8, .*; use 8 or more"),
        ("rollout.temperature", -0.1, r"rollout.temperature=-0.1 is outside \[0, inf\)"),
        ("rollout.temperature", 0.0, "rollout.temperature=0: .* use a value above 0"),
        ("rollout.top_p", 0.9, "rollout.top_p=0.9: the loss would not see .* train with 1"),
        ("rollout.top_k", 5, "rollout.top_k=5: the loss would not see .* train with 0"),
        ("rollout.min_p", 0.1, "rollout.min_p=0.1: the loss would not see .* train with 0"),
        ("prompt.shots", 9, r"prompt.shots=9 is outside \[0, 8\]"),
        ("num_steps", 0, r"num_steps=0 is outside \[1, inf\)"),
        ("seed", -1, r"seed=-1 is outside \[0, 4294967295\]"),
        ("base.steps", -1, r"base.steps=-1 is outside \[1, inf\)"),  # would never end
        ("base.decay", 0.0, r"base.decay=0.0 is outside \(0, 1\]"),
        ("optim.lr", float("nan"), "optim.lr=nan is outside"),
        ("optim.lr", float("inf"), "optim.lr=inf is outside"),
        ("objective.clip_high", 1e300, r"objective.clip_high=1e\+300 is more than fp32 holds; use 1e\+38 at most"),
        ("optim.betas", (0.9, 1.0), r"optim.betas=\(0.9, 1.0\) is outside \[0, 1\)"),
        ("objective.beta", -0.1, r"objective.beta=-0.1 is outside \[0, inf\)"),
        ("data.validation_fraction", 1.0, r"data.validation_fraction=1.0 is outside \(0, 1\)"),
    ],
)
def test_what_cannot_work_is_refused_with_value_and_remedy(key, value, message):
    check(Config(), world_size=8)
    with pytest.raises(ValueError, match=message):
        check(changed(key, value), world_size=8)


@pytest.mark.parametrize(("world_size", "minibatches"), [(3, 1), (1, 3), (2, 4), (3, 4)])
def test_numbers_of_prompts_that_are_advised_are_not_refused_in_their_turn(world_size, minibatches):
    asked = lambda prompts: from_dict({"rollout": {"prompts_per_step": prompts}, "batch": {"minibatches": minibatches}})
    for prompts in (1, 4, 6, 10, 16):
        try:
            check(asked(prompts), world_size)
        except ValueError as error:
            for advised in str(error).partition("; use ")[2].split(" or "):
                check(asked(int(advised)), world_size)


def test_all_mistakes_are_reported_at_once():
    config = replace(changed("num_steps", 0), optim=replace(Config().optim, lr=-1.0))
    with pytest.raises(ValueError) as refused:
        check(config, world_size=1)
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"model": {"compile": True, "gradient_checkpointing": True}},
            "model.compile with model.grad.*: .* choose one",
        ),
        (
            {"lora": {"rank": 4, "target_modules": []}},
            "lora.rank=4 without lora.target_modules: nothing would be trained; name some",
        ),
        ({"lora": {"rank": 4}, "distributed": {"strategy": "fsdp"}}, "strategy=fsdp with adapters: .* use ddp"),
        (
            {"lora": {"rank": 4}, "model": {"reference_offload": True}},
            "reference_offload with adapters: .* leave it off",
        ),
        (
            {"model": {"reference_offload": True}, "objective": {"ref_refresh_every": 5}},
            "reference_offload with objective.ref_refresh_every=5: .* choose one",
        ),
        ({"prompt": {"template_options": ["a=1"]}}, r"template_options=\['a=1'\] with prompt.style=plain: use chat"),
        (
            {"rewards": {"step_timeout_s": 1800}},
            r"step_timeout_s=1800.0 must be less than distributed.timeout_s=1800.0",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_and_each_alone_is_not(values, message):
    with pytest.raises(ValueError, match=message):
        check(from_dict(values), world_size=1)
    alone = [{section: {key: value}} for section, keys in values.items() for key, value in keys.items()]
    if len(alone) > 1:
        for setting in alone:
            check(from_dict(setting), world_size=1)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": {"style": "chat", "template_options": ["a=1"]}},
        {"lora": {"rank": 4, "target_modules": [], "modules_to_save": ["lm_head"]}},
        {"lora": {"dropout": 0.1}},  # of no adapters
        {"rollout": {"group_size": 7, "max_sequences": 7}},
    ],
)
def test_settings_that_go_together_pass(values):
    check(from_dict(values), world_size=1)


# --- resuming with another config ---


@pytest.mark.parametrize("key, value", [("num_steps", 99), ("eval.every", 3), ("distributed.timeout_s", 60.0)])
def test_a_run_that_goes_on_may_change_what_touches_no_step(key, value):
    assert changes(Config(), changed(key, value)) == ([f"{key}: {DEFAULTS[key]} -> {value}"], [])


@pytest.mark.parametrize("key, value", [("optim.lr", 0.5), ("rollout.group_size", 4), ("data.path", "moved/")])
def test_a_run_that_goes_on_is_told_what_changes_its_steps(key, value):
    assert changes(Config(), changed(key, value)) == ([], [f"{key}: {DEFAULTS[key]!r} -> {value!r}"])


@pytest.mark.parametrize("key, value", [("seed", 1), ("model.path", "other"), ("base.steps", 7), ("task", "gsm8k")])
def test_a_run_that_goes_on_keeps_what_its_checkpoint_depends_on(key, value):
    with pytest.raises(ValueError, match=f"cannot change {key}: {DEFAULTS[key]!r} -> {value!r}; start another"):
        changes(Config(), changed(key, value))


def test_an_unchanged_config_has_no_changes():
    assert changes(Config(), Config()) == ([], [])


def test_every_key_and_section_of_the_tables_exists():
    known = known_keys()
    for entry in (*FIXED, *FREE):
        assert any(f"{key}.".startswith(f"{entry}.") for key in known), entry


# --- the dry run ---

SETTLED = replace(Config(), batch=replace(Config().batch, tokens_per_micro_batch=16384))


def test_the_effective_batch_by_hand():
    # 16 prompts x 8 = 128 completions of 40 + 10 prompt tokens; on 2 ranks 64 each; 2 minibatches: 4 groups of
    # 10 + 8 * 40 = 330 tokens a step and rank; 500 tokens hold one of them, so 4 micro-batches.
    config = replace(Config(), batch=replace(Config().batch, minibatches=2, tokens_per_micro_batch=500))
    report = dry_run.dry_run_report(config, 2, FACTS)
    assert "per step: 16 prompts x 8 = 128 completions; 5,120 tokens sampled, 6,400 trained on with prompts" in report
    assert "per rank: 8 prompts x 8 = 64 completions; 2,560 tokens sampled, 3,200 trained on with prompts" in report
    assert "1 passes x 2 minibatches" in report
    assert "per optimizer step and rank: 4 of at most 500 tokens, packed" in report
    assert yaml.safe_load(report.split("effective batch")[0]) == yaml.safe_load(dump(config))


@pytest.mark.parametrize(
    "layout, budget, expected",
    [
        ("packed", 660, 8),  # 16 groups of 330 tokens, two at a time
        ("auto", 130, 48),  # a group in three parts: 130 tokens hold the prompt and 3 completions of 40
        ("auto", 125, 64),  # and of 2, without the prompt: 125 - 10 < 3 * 40
        ("packed", 40, 128),  # a part is never less than a completion
        ("padded", 130, 64),  # 128 sequences of 50, two at a time
        ("padded", 40, 128),  # a sequence that is longer than the budget has one to itself
    ],
)
def test_the_number_of_micro_batches_by_hand(layout, budget, expected):
    config = replace(Config(), batch=replace(Config().batch, layout=layout, tokens_per_micro_batch=budget))
    assert f"rank: {expected} of at most" in dry_run.dry_run_report(config, 1, FACTS)


def test_the_memory_estimate_by_hand():
    # 128 sequences in 16 groups: 16 * 10 + 128 * 40 = 5280 cached tokens, each of
    # 2 (K, V) * 2 layers * 2 heads * 8 wide * 2 bytes = 128 bytes.
    memory = dry_run.memory_estimate(SETTLED, 1, FACTS)
    assert memory["fp32 masters"] == memory["gradients, fp32"] == 4000
    assert memory["Adam moments, fp32"] == 8000
    assert memory["working copy, bf16"] == memory["frozen reference"] == 2000
    assert memory["KV cache"] == 5280 * 128
    assert memory["activations of a micro-batch"] == 16384 * 2 * (8 * 32 + 4 * 64) * 2
    assert memory["logits of a chunk"] == 4 * 100 * 16 and memory["logits of a decoding step"] == 2 * 4 * 100 * 128
    turns = replace(SETTLED, rollout=replace(Config().rollout, max_sequences=20))  # of 3 groups at a time
    assert dry_run.memory_estimate(turns, 1, FACTS)["KV cache"] == (3 * 10 + 20 * 40) * 128
    assert dry_run.memory_estimate(SETTLED, 2, FACTS)["KV cache"] == 5280 // 2 * 128
    checkpointed = replace(SETTLED, model=replace(Config().model, gradient_checkpointing=True))
    memory = dry_run.memory_estimate(checkpointed, 1, FACTS)
    assert memory["activations of a micro-batch"] == 16384 * (2 * 32 + 8 * 32 + 4 * 64) * 2
    adapted = dry_run.memory_estimate(SETTLED, 1, replace(FACTS, num_trained=10))
    assert adapted["fp32 masters"] == adapted["gradients, fp32"] == 40 and adapted["Adam moments, fp32"] == 80
    assert adapted["frozen base"] == 2 * 990
    assert adapted["working copy, bf16"] == adapted["frozen reference"] == 20
    moved = replace(SETTLED, objective=replace(Config().objective, ref_refresh_every=5))
    assert dry_run.memory_estimate(moved, 1, FACTS)["masters of the reference, fp32"] == 4000
    in_fp32 = dry_run.memory_estimate(moved, 1, replace(FACTS, bytes_per_element=4))
    assert "masters of the reference, fp32" not in in_fp32, "they are the reference"
    waiting = replace(SETTLED, model=replace(Config().model, reference_offload=True))
    memory = dry_run.memory_estimate(waiting, 1, FACTS)
    assert "frozen reference" not in memory and memory["activations, or frozen reference"] == 16384 * 2 * 512 * 2
    in_fp32 = dry_run.memory_estimate(SETTLED, 1, replace(FACTS, bytes_per_element=4, has_reference=False))
    assert not {"frozen base", "working copy, bf16", "frozen reference"} & set(in_fp32)
    gpt2 = replace(FACTS, shape=GPT2Config(n_layer=2, n_head=4, n_embd=32))
    memory = dry_run.memory_estimate(SETTLED, 1, gpt2)
    assert memory["activations of a micro-batch"] == 16384 * 2 * (8 * 32 + 4 * 128) * 2
    assert memory["KV cache"] == 5280 * 2 * 2 * 4 * 8 * 2
    (wide := copy.deepcopy(FACTS.shape)).head_dim = 24  # of its own, as Qwen3's
    assert dry_run.memory_estimate(SETTLED, 1, replace(FACTS, shape=wide))["KV cache"] == 5280 * 128 * 3


def test_long_completions_take_turns_in_the_memory_for_keys_and_values():
    # A sequence of 1000 and its eighth of a prompt of 16: 1002 tokens of 128 bytes; 20 times that holds 20 of 128.
    config = replace(SETTLED, rollout=replace(Config().rollout, max_new_tokens=1000))
    facts = replace(FACTS, prompt_tokens=16, kv_budget=20.5 * 1002 * 128)
    assert dry_run.memory_estimate(config, 1, facts)["KV cache"] == (20 * 1000 + 3 * 16) * 128
    assert "decoded at a time, per rank: 20 of 128, each with" in dry_run.dry_run_report(config, 1, facts)
    everything = dry_run.memory_estimate(config, 1, replace(facts, kv_budget=math.inf))
    assert everything["KV cache"] == (128 * 1000 + 16 * 16) * 128


def test_the_memory_for_keys_and_values_is_the_samplers_where_it_is_known(monkeypatch):
    monkeypatch.setattr(slab, "total_memory", lambda device: 1000)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert dry_run._kv_budget(Config(), cpu, False) == 0.3 * 1000
    assert dry_run._kv_budget(Config(), cpu, True) == math.inf  # asked on a CPU for a card
    assert dry_run._kv_budget(changed("rollout.kv_gib", 2.0), cuda, True) == 2 * 2**30


def test_a_sequence_longer_than_the_budget_is_a_micro_batch_of_its_own_length():
    config = replace(SETTLED, rollout=replace(Config().rollout, max_new_tokens=20_000))
    memory = dry_run.memory_estimate(config, 1, FACTS)
    assert memory["activations of a micro-batch"] == (10 + 20_000 - 1) * 2 * (8 * 32 + 4 * 64) * 2
    assert "128 of at most 20,009 tokens" in dry_run.dry_run_report(config, 1, FACTS)


@pytest.mark.parametrize(
    ("strategy", "precision", "expected"),
    [  # masters, gradients, moments, working copy or what is gathered; 1000 parameters on 4 ranks
        ("ddp", 2, [4000, 4000, 8000, 2000]),
        ("zero1", 2, [1000, 4000, 2000, 2000]),
        ("zero1", 4, [4000, 4000, 2000]),  # the masters are what samples
        ("fsdp", 2, [1000, 1000, 2000, 4000]),  # 400 outside the layers and two layers of 300, with gradients
        ("fsdp", 4, [1000, 1000, 2000, 8000]),
    ],
)
def test_the_estimate_of_what_ranks_share_out_by_hand(strategy, precision, expected):
    config = replace(Config(), distributed=replace(Config().distributed, strategy=strategy))
    permanent, temporary = dry_run.weights_estimate(
        config, 4, replace(FACTS, bytes_per_element=precision, has_reference=False)
    )
    assert list(permanent.values()) == expected
    assert list(temporary.values()) == ([precision * 1000] if strategy == "fsdp" else [])


def test_the_report_compares_strategies_on_one_rank_and_on_eight():
    lines = dry_run.dry_run_report(SETTLED, 1, replace(FACTS, num_parameters=2**30, num_trained=2**30)).splitlines()
    ddp, zero1, fsdp = (list(map(float, line.split()[1:])) for line in lines[-3:])
    assert ddp[0] == zero1[0] == fsdp[0]  # one rank has everything
    assert ddp[1] - zero1[1] == pytest.approx(12 * 7 / 8, abs=0.11)  # of 4 + 8 bytes a parameter an eighth is left


def test_the_activation_estimate_is_within_a_quarter_of_what_a_qwen2_keeps_for_backward():
    shape = Qwen2Config(**SIZES, hidden_size=128, intermediate_size=512, num_attention_heads=4, vocab_size=64)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").model
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(4, 64, dtype=torch.long))
    measured = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    config = replace(Config(), batch=replace(Config().batch, tokens_per_micro_batch=4 * 64))
    facts = replace(FACTS, shape=shape, bytes_per_element=4)
    assert dry_run.memory_estimate(config, 1, facts)["activations of a micro-batch"] == pytest.approx(
        measured, rel=0.25
    )
