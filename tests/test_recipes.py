"""docs/recipes.md and every command in the documents: options exist, configs fit, what can run here runs."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config

import eval as evaluation
import train
from grpo import dry_run
from grpo.command_line import RunOptions, parse_command
from grpo.config import Config, known_keys
from grpo.config_check import check
from grpo.metrics import read_metrics
from grpo.rewards.__main__ import main as rewards_main
from grpo.rewards.sandbox import find_sandbox
from grpo.run import fill_in_objective
from tests.tiny import save_tiny_model, write_gsm8k_files

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
TRAINING = [line for line in COMMANDS if "train.py" in line]
SMALL = "--num-steps 1 --rollout.prompts-per-step 2 --rollout.group-size 2 --eval.validation-problems 2"
SMALL = f"{SMALL} --eval.test-problems 2".split()
CHAT = """{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '<|endoftext|>' if m['role'] == 'assistant' }}
{% endfor %}assistant: """


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with a byte-level tokenizer and a chat template, in the place of the hub's."""
    folder = tmp_path_factory.mktemp("recipes") / "model"
    save_tiny_model(folder, context=4096)
    (folder / "chat_template.jinja").write_text(CHAT)
    return str(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def skip_without_walls() -> None:
    try:
        find_sandbox("auto", 3.0)
    except ValueError as error:
        pytest.skip(str(error))


def options_of(command: str) -> list[str]:
    """What train.py is given by a command that may have a launcher before it."""
    return shlex.split(command.partition("train.py")[2])


def test_every_option_of_train_py_that_a_document_names_exists():
    known = {key.replace("_", "-") for key in [*typing.get_type_hints(RunOptions), *known_keys(), "help"]}
    known |= {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id"}  # torchrun's own
    seen = 0
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.yaml")]:
        joined = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"train\.py((?: [^`\n]*)?)", joined):
            named = [option.replace("_", "-") for option in re.findall(r"--([a-z][\w.-]*)", line)]
            assert not set(named) - known, f"{path.name}: train.py{line}"
            seen += len(named)
        keys = set(re.findall(r"`--((?:[a-z]+\.)[a-z_-]+)", joined))
        assert not {key.replace("_", "-") for key in keys} - known, path.name
    assert seen > 40


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_command_of_the_page_fits_1_2_and_8_ranks(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse_command(options_of(command)).config
    for world_size in (1, 2, 8):
        check(config, world_size)


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_command_of_the_page_dry_runs_with_a_small_local_model(command, model, workplace, capsys):
    options = [*options_of(command), "--dry-run"]
    (workplace / "my_task.py").write_text(re.search(r"```python\n(import .*?)```", PAGE, re.DOTALL)[1])
    for own in re.findall(r"\w+\.jsonl", command):
        (workplace / own).touch()
    if "code" in command:
        skip_without_walls()
    if any(name in command for name in ("gsm8k", "code", "keywords", "smollm2")):
        options += ["--model.path", model]
    elif "--model.path" in options:
        options[options.index("--model.path") + 1] = model
    assert train.main(options) == 0
    assert "memory per rank" in capsys.readouterr().out


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python eval.py")])
def test_an_evaluation_command_of_the_page_parses(command):
    assert evaluation.parse(shlex.split(command)[2:]).task in ("gsm8k", "code")


@pytest.mark.parametrize("task", ["keywords", "code"])
def test_the_rewards_of_an_embedded_task_pay_references_in_full(task, capsys):
    if task == "code":
        skip_without_walls()
    assert f"python -m grpo.rewards check {task}" in COMMANDS and rewards_main(["check", task]) == 0
    assert re.search(r"\n +reference( +1\.000)+ +0\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["gsm8k_instruct", "keywords", "code"])
def test_a_recipe_with_a_chat_template_trains_a_step(name, model, workplace):
    if name == "code":
        skip_without_walls()
    write_gsm8k_files(workplace / "data")
    options = ["--config", f"configs/{name}.yaml", "--model.path", model, "--run-dir", "run", *SMALL]
    options += ["--data.path", "data"] if name == "gsm8k_instruct" else []
    assert train.main([*options, "--rollout.max-new-tokens", "8"]) == 0
    assert [row["step"] for row in read_metrics(workplace / "run")] == [1]
    saved = workplace / "run" / "checkpoints" / "step_1"
    ends = [AutoTokenizer.from_pretrained(saved).convert_tokens_to_ids(end) for end in ("<eos>", "<|endoftext|>")]
    assert GenerationConfig.from_pretrained(saved).eos_token_id == ends  # the tokenizer's, and that of a turn


def test_word_problems_gpu_trains_its_base_and_goes_on_with_grpo(workplace):
    base = {"hidden-size": 32, "num-layers": 2, "num-heads": 2, "intermediate-size": 32, "steps": 20, "batch-size": 8}
    options = [f"--base.{name}={value}" for name, value in {**base, "validation-problems": 4}.items()]
    options += ["--config", "configs/word_problems_gpu.yaml", "--run-dir", "run", *SMALL, "--num-steps", "2"]
    assert train.main(options) == 0
    first = (workplace / "run" / "completions" / "step_1.jsonl").read_text()
    assert len(read_metrics(workplace / "run")) == 2 and re.search(r"also has|buys|has \d\d ", first)


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_the_class_for_prompts_as_they_stand_adds_no_word(style, model, workplace):
    (block,) = re.findall(r"```python\n([^`]*class Verbatim.*?)```", PAGE, re.DOTALL)
    (workplace / "verbatim.py").write_text(block)
    rows = [{"prompt": f"Capital of country {i}?", "answer": f"City {i}"} for i in range(40)]
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "verbatim.py:Verbatim", "--data.path", "rows.jsonl", "--model.path", model, *SMALL]
    options += ["--run-dir", "run", "--prompt.shots", "0", "--prompt.style", style, "--rollout.max-new-tokens", "4"]
    assert train.main(options) == 0
    record = json.loads((workplace / "run" / "completions" / "step_1.jsonl").read_text().splitlines()[0])
    number = re.fullmatch(r"City (\d+)", record["answer"])[1]
    question = f"Capital of country {number}?"
    assert record["prompt"] == (question if style == "plain" else f"user: {question}\nassistant: ")
    assert rewards_main(["check", "verbatim.py:Verbatim", "--data.path", "rows.jsonl"]) == 0


def test_your_own_data_and_reward_run_as_the_page_says(model, workplace):
    task, rows = re.findall(r"```python\n(import .*?)```", PAGE, re.DOTALL)[:2]
    (workplace / "my_task.py").write_text(task)
    (workplace / "rows.py").write_text(rows)
    ours = COMMANDS[COMMANDS.index("python rows.py") :][:4]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in ours[:2]:
        arguments = [sys.executable, *shlex.split(command)[1:]]
        printed = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True).stdout
    assert re.search(r"reference +1\.000", printed) and re.search(r"empty +0\.000", printed)
    options = options_of(ours[3])
    options[options.index("--model.path") + 1] = model
    assert train.main([*options, *SMALL]) == 0
    assert 0 <= read_metrics(workplace / "runs" / "pens")[0]["reward"] <= 1
    (pretrained,) = (options_of(command) for command in TRAINING if "smollm2" in command)
    assert train.main([*pretrained, "--model.path", model, *SMALL, "--rollout.max-new-tokens", "8"]) == 0
    first = (workplace / "runs" / "smollm2" / "completions" / "step_1.jsonl").read_text()
    assert re.match(r".*How many pens do they have\?\\nAnswer:", first), "asked like GSM8K"


def test_a_sagemaker_job_gives_train_py_its_hyperparameters_and_started_again_goes_on(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("import sys; open('said', 'w').write('\\n'.join(sys.argv[1:]))")
    given = ast.literal_eval(re.search(r"hyperparameters=(\{.*?\})", PAGE, re.DOTALL)[1])
    given = [part for name in sorted(given) for part in (f"--{name}", str(given[name]))]  # as SageMaker's toolkit does
    run, script = tmp_path / "checkpoints" / "run", (ROOT / "docs" / "train_sagemaker.py").read_text()
    (tmp_path / "script.py").write_text(script.replace("/opt/ml/checkpoints/run", str(run)))

    def said(rank="0"):
        environment = {**os.environ, "RANK": rank}
        subprocess.run([sys.executable, "script.py", *given], cwd=tmp_path, env=environment, check=True)
        return (tmp_path / "said").read_text().splitlines()

    options = said()
    monkeypatch.chdir(ROOT)
    command = parse_command(options)
    assert command.run_dir == str(run) and command.config.num_steps == 200
    assert command.config.data.path == "/opt/ml/input/data/gsm8k"
    run.mkdir(parents=True)
    assert said(rank="1") == options and run.is_dir(), "only rank 0 clears a folder"
    assert said() == options and not run.exists(), "interrupted before its first checkpoint: it begins again"
    (run / "checkpoints" / "step_20").mkdir(parents=True)
    assert said() == ["--resume", str(run)]


QWEN = {  # width, layers, heads, heads of keys, MLP, vocabulary; the 7B does not tie its embeddings
    "0.5B": (896, 24, 14, 2, 4864, 151_936),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936),
    "7B": (3584, 28, 28, 4, 18_944, 152_064),
}


def on_a_card(monkeypatch, config: str, size: str, *options: str) -> tuple[Config, dry_run.ModelFacts]:
    """What a dry run knows of a model of Qwen2.5's shape in bf16 on CUDA."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    shape = dict(zip((*names, "vocab_size"), QWEN[size], strict=True))
    qwen = Qwen2Config(**shape, tie_word_embeddings=size != "7B")
    monkeypatch.setattr(dry_run, "load_model_config", lambda path: qwen)
    asked, _ = fill_in_objective(parse_command(["--config", f"{ROOT}/configs/{config}.yaml", *options]).config)
    return asked, dry_run.model_facts(asked, torch.device("cuda"))


def gib(estimate: dict[str, int]) -> float:
    return sum(estimate.values()) / 2**30


def test_the_memory_of_every_recipe_is_what_a_dry_run_on_a_card_says(monkeypatch):
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for config, told in rows:
        asked, facts = on_a_card(monkeypatch, config, "0.5B")
        assert round(gib(dry_run.memory_estimate(asked, 1, facts))) == int(told), config


def test_what_fits_is_what_a_dry_run_on_a_card_says(monkeypatch):
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| [\d.]+B ", line)]
    assert [size for size, *_ in rows] == 2 * list(QWEN)
    saving = ("--model.gradient-checkpointing", "--model.reference-offload")
    for size, *told in rows[:3]:
        asked, facts = on_a_card(monkeypatch, "gsm8k", size, *saving)
        found = []
        for ranks, name in ((1, "ddp"), (8, "ddp"), (8, "zero1"), (8, "fsdp")):
            shared = replace(asked, distributed=replace(asked.distributed, strategy=name))
            found.append(f"{gib(dry_run.memory_estimate(shared, ranks, facts)):.1f}")
        assert found == told
    for size, *told in rows[3:]:
        found = []
        for name in ("none", "nf4"):
            asked, facts = on_a_card(monkeypatch, "gsm8k_lora", size, saving[0], f"--lora.quantize={name}")
            estimate = dry_run.memory_estimate(asked, 1, facts)
            found.append(f"{estimate['frozen base'] / 2**30:.2f} ({gib(estimate):.1f})")
        assert found == told


STAND_INS = {
    "scontrol": "echo localhost; echo other",
    ".venv/bin/torchrun": 'printf "%s\\n" "$@" > said',
    "srun": '"$@"',
}


def test_the_slurm_script_starts_torchrun_and_a_requeued_job_goes_on(tmp_path):
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_NAME": "grpo", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    environment = {**job, "SLURM_GPUS_ON_NODE": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def said(*options, **more):
        script = ["bash", str(ROOT / "docs" / "train.sbatch"), *options]
        subprocess.run(script, cwd=tmp_path, env={**environment, **more}, check=True)
        return (tmp_path / "said").read_text().split()

    first = said("--seed", "3")
    assert first[:2] == ["--nnodes=2", "--nproc-per-node=8"] and "--rdzv-endpoint=localhost:29500" in first
    assert first[-5:] == ["train.py", "--run-dir", "runs/grpo-7", "--seed", "3"]
    (tmp_path / "runs" / "grpo-7").mkdir(parents=True)
    assert said("--seed", "3", SLURM_RESTART_COUNT="1")[-5:] == first[-5:]
    assert not (tmp_path / "runs" / "grpo-7").exists()
    (tmp_path / "runs" / "grpo-7" / "checkpoints" / "step_2").mkdir(parents=True)
    assert said("--seed", "3", SLURM_RESTART_COUNT="2")[-3:] == ["train.py", "--resume", "runs/grpo-7"]
    again = ["--resume", "runs/grpo-7", "--num-steps", "9"]  # a new job, which is requeued at once
    for restarts in ({}, {"SLURM_RESTART_COUNT": "1"}):
        assert said(*again, SLURM_JOB_ID="8", **restarts)[-5:] == ["train.py", *again]
    assert said("--resume=runs/grpo-7", SLURM_JOB_ID="8")[-2:] == ["train.py", "--resume=runs/grpo-7"]
