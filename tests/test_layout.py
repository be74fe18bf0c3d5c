"""The arrows of the house: which room may import which. The folder listing is the drawing; this table is its legend."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALL = "every room"  # train.py's parts are put together there
ARROWS = {  # room of grpo: the rooms that it may import
    "config": "",
    "config_check": "config",
    "command_line": "config",
    "records": "",
    "user_code": "",
    "tasks": "config records rewards user_code",
    "policy": "sharding",
    "lora": "checkpoint config policy",
    "layers": "",
    "rollout": "config layers machine records",
    "rewards": "config machine records user_code",
    "batch": "records",
    "attention": "layers records",
    "logprobs": "attention layers policy records",
    "first_batch": "batch layers logprobs records",
    "advantages": "",
    "objectives": "user_code",
    "update": "batch config distributed logprobs objectives records sharding",
    "base": "config records rewards rollout tasks",
    "evaluation": "distributed records rewards rollout",
    "distributed": "machine",
    "sharding": "distributed layers",
    "checkpoint": "",
    "live": "",
    "machine": "",
    "metrics": "live records trackers",
    "dry_run": "base config layers lora policy rollout tasks",
    "run": ALL,
    "results": "base checkpoint evaluation metrics policy run",
    "report": "config metrics",
    "trackers": "",
}
FILES = {  # single files that may see more than their room: the command line of the rewards room
    "grpo/rewards/__main__.py": "config tasks",
}
USE_KERNELS = {"attention", "dry_run", "logprobs", "rollout", "run"}
WITHOUT_A_MODEL = {"tasks", "rewards"}
ONLY_TORCH = {"advantages", "objectives"}
IMPORTED_WHERE_USED = (
    "bitsandbytes",
    "datasets",
    "math_verify",
    "matplotlib",
    "mlflow",
    "tensorboard",
    "torch.utils.tensorboard",
    "trackio",
    "tyro",
    "wandb",
)
BESIDE_THE_LOOP = {"dry_run", "report", "results"}  # what train.py and people call, `run` does not
SEES_EVERY_ROOM = {"train.py", "eval.py", "tests", "benchmarks"}


def imports(tree: ast.AST, is_top: bool = True) -> Iterator[tuple[str, bool]]:
    """Every imported dotted name and whether importing the file imports it; what only type checkers see is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", is_top) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (found for other in node.orelse for found in imports(other, is_top))
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, is_top and not is_function)


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of one file; path is relative to the repository."""
    found = []
    for name, is_top in imports(ast.parse(source)):
        reason = _forbidden(path, name, is_top)
        if reason:
            found.append(f"{path} imports {name}: {reason}")
    return found


def _forbidden(path: str, name: str, is_top: bool) -> str | None:
    package, _, rest = path.partition("/")
    if package in SEES_EVERY_ROOM:
        return "nothing imports train.py or eval.py" if package != "tests" and _is(name, "train", "eval") else None
    if name.startswith("."):
        return "spell it in full"
    if _is(name, "train", "eval", "tests", "benchmarks"):
        return "nothing imports these"
    if _is(name, "peft"):
        return "peft is what the tests compare with"
    if is_top and _is(name, *IMPORTED_WHERE_USED):
        return "import it inside the function that uses it"
    if re.match(r"kernels\.\w+\.kernel(\.|$)", name) and not re.fullmatch(r"kernels/(\w+/bench|__init__)\.py", path):
        return "only the dispatch, tests and benches import a kernel"
    if package == "kernels":
        return None if _is(name, "kernels", "torch", "triton") or _is_standard(name) else "kernels knows only torch"
    return _forbidden_in_room(rest.partition("/")[0].removesuffix(".py"), path, name)


def _forbidden_in_room(room: str, path: str, name: str) -> str | None:
    if room == "__init__":
        return "grpo itself is empty"
    if room not in ARROWS:
        return "its room is not in ARROWS; add a row"
    if room in WITHOUT_A_MODEL and _is(name, "transformers", "kernels"):
        return f"{room} never sees a model"
    if _is(name, "kernels") and room not in USE_KERNELS:
        return f"{room} does not use kernels"
    if room in ONLY_TORCH and not _is(name, "torch", "grpo.user_code") and not _is_standard(name):
        return f"{room} knows only torch"
    other = name.split(".")[1] if name.startswith("grpo.") else ""
    if ARROWS[room] == ALL:
        return f"{room} is above {other}, which is above it" if other in BESIDE_THE_LOOP else None
    allowed = [room, *ARROWS[room].split(), *FILES.get(path, "").split()]
    return f"{room} may import {allowed[1:]}" if _is(name, "grpo") and other not in allowed else None


def _is(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def test_every_import_follows_the_arrows():
    sources = [
        path
        for pattern in ("*.py", "grpo/**/*.py", "kernels/**/*.py", "benchmarks/**/*.py")
        for path in ROOT.glob(pattern)
    ]
    assert len(sources) > 10
    assert [line for path in sources for line in violations(path.relative_to(ROOT).as_posix(), path.read_text())] == []


def test_every_arrow_is_an_import():
    drawn = {(room, other) for room, others in ARROWS.items() if others != ALL for other in others.split()}
    for path in (ROOT / "grpo").rglob("*.py"):
        room = path.relative_to(ROOT / "grpo").parts[0].removesuffix(".py")
        drawn -= {(room, name.split(".")[1]) for name, _ in imports(ast.parse(path.read_text())) if _is(name, "grpo")}
    assert not drawn


@pytest.mark.parametrize(
    "path, source",
    [
        ("grpo/config.py", "from grpo.records import Group"),
        ("grpo/lora.py", "def f():\n    from peft import PeftModel"),
        ("grpo/records.py", "import grpo.config"),
        ("grpo/advantages.py", "import transformers"),
        ("grpo/objectives.py", "from grpo import config"),
        ("grpo/tasks/gsm8k.py", "def f():\n    from transformers import AutoModel"),
        ("grpo/tasks/gsm8k.py", "import datasets"),
        ("grpo/tasks/gsm8k.py", "try:\n    import datasets\nexcept ImportError:\n    pass"),
        ("grpo/rewards/runner.py", "from grpo.policy import Policy"),
        ("grpo/rewards/verifiers.py", "from grpo.tasks import make_task"),
        ("grpo/batch.py", "import kernels"),
        ("grpo/metrics.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("grpo/update.py", "from grpo.rollout import Sampler"),
        ("grpo/rollout/engine.py", "from .slab import KVSlab"),
        ("grpo/rollout/engine.py", "def f():\n    import train"),
        ("grpo/new_room.py", "import torch"),
        ("grpo/run.py", "from grpo.results import finish"),
        ("grpo/update.py", "from grpo.run import Run"),
        ("kernels/__init__.py", "from grpo.records import Group"),
        ("kernels/sample_token/kernel.py", "import transformers"),
        ("kernels/sample_token/reference.py", "from kernels.sample_token import kernel"),
        ("grpo/logprobs.py", "from kernels.linear_logprob.kernel import forward"),
        ("eval.py", "from train import main"),
        ("benchmarks/step.py", "import train"),
    ],
)
def test_a_planted_violation_is_caught(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("grpo/tasks/rows.py", "def f():\n    from datasets import load_dataset"),
        ("grpo/tasks/prompts.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerBase"),
        ("grpo/rewards/__main__.py", "from grpo.tasks import make_task"),
        ("grpo/rollout/engine.py", "import kernels\nfrom grpo.rollout.slab import KVSlab"),
        ("kernels/__init__.py", "from kernels.sample_token import kernel, reference"),
        ("kernels/sample_token/kernel.py", "import torch, math\nimport triton.language as tl"),
        ("grpo/run.py", "from grpo import lora\nfrom grpo.update import Updater\nfrom kernels import dispatch_table"),
        ("train.py", "import tyro\nfrom grpo import base, metrics"),
    ],
)
def test_what_the_drawing_allows_passes(path, source):
    assert violations(path, source) == []


def test_the_wheel_carries_every_file_that_the_package_reads():
    from grpo import metrics, report
    from grpo.tasks import rows

    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folders = {package: ROOT / package.replace(".", "/") for package in table}
    carried = {path for package, patterns in table.items() for name in patterns for path in folders[package].glob(name)}
    files = {path for package in ("grpo", "kernels") for path in (ROOT / package).rglob("*.*") if path.is_file()}
    assert carried == {path for path in files if path.suffix not in (".py", ".pyc")}
    assert {metrics.DEFINITIONS, report.TEMPLATE, *rows.DATA.iterdir()} <= carried


def test_transformers_saves_and_loads_a_model_beside_our_folder_named_kernels(tmp_path):
    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels", "ours shadows the package that transformers can use"
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = Qwen2Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    model = AutoModelForCausalLM.from_config(shape).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
