"""Whole training steps beside TRL's, phase by phase: python -m benchmarks.vs_trl

The same random model, prompts, group size, longest completion, optimizer and settings for TRL's GRPOTrainer and for
train.py's own step. Each contender runs in its own process, so that its peak memory is its own; they take turns, a step
each. The reward is the share of letters out of the first half of the alphabet, so both reward curves start at a half.
TRL's `generate` contender uses its defaults except for what `trl_settings` states; `continuous batching` is left out,
with the reason, if it fails. Update: everything in a step but generation. Last line: JSON, and one after every turn, so
that a comparison that is cut off is not lost.

Needs benchmarks/requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.common import QWEN_HALF_B, default_device, make_parser, measured_on, qwen_shape
from benchmarks.letters import early_letters
from kernels.measure import resident_mib

ROOT = Path(__file__).parents[1]
OURS, GENERATE, BATCHING = "grpo", "TRL generate", "TRL continuous batching"


@dataclass(frozen=True)
class Workload:
    """What a step is made of; prompts are as long as those of GSM8K with eight worked exemplars."""

    prompts: int
    group_size: int
    new_tokens: int
    trl_batch: int  # completions of one of TRL's micro-batches
    model: dict[str, int]
    shortest: int = 700
    longest: int = 780


WORKLOADS = {
    "cpu": Workload(
        prompts=4,
        group_size=8,
        new_tokens=128,
        trl_batch=32,
        model=qwen_shape(8, 512, 1408, 8, 8192),
    ),
    "cuda": Workload(
        prompts=64,
        group_size=16,
        new_tokens=256,
        trl_batch=16,
        model=QWEN_HALF_B,
    ),
}
WORKLOADS["tiny"] = Workload(  # to see that it runs
    prompts=2,
    group_size=4,
    new_tokens=12,
    trl_batch=8,
    model=WORKLOADS["cpu"].model | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128},
    shortest=20,
    longest=30,
)
LEARNING_RATE, BETA = 1e-6, 0.02


def write_model_and_prompts(work: Workload, folder: Path, steps: int) -> None:
    """model/ in Hugging Face layout, with a tokenizer of made-up words; prompts.jsonl, enough for all steps."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3)) for _ in range(2000)]
    untrained = Qwen2Tokenizer(pad_token="<pad>", eos_token="<eos>", unk_token="<eos>")
    tokenizer = untrained.train_new_from_iterator([" ".join(words)] * 2, vocab_size=8192, show_progress=False)
    torch.manual_seed(0)
    config = Qwen2Config(
        **work.model,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with default_device():  # a CPU takes half of a minute to draw half a billion numbers
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder / "model")
    del model
    torch.cuda.empty_cache()
    tokenizer.save_pretrained(folder / "model")
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(work.prompts * (steps + 1) * 2):
            text, missing = "", rng.randint(work.shortest, work.longest)
            while missing > 0:
                piece = " " + " ".join(rng.choices(words, k=10))  # begins with a space: tokenized alone as in the text
                text, missing = text + piece, missing - len(tokenizer(piece).input_ids)
            file.write(json.dumps({"prompt": text.strip(), "answer": "0"}) + "\n")


# The contenders: each waits for a line on standard input before every step, and answers with one ---------------------


def answer(**facts: object) -> None:
    print(json.dumps(facts), file=sys.__stdout__, flush=True)


def peak_mib(device: torch.device) -> float:
    """Most memory of this process so far: the allocator's on CUDA, else resident."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_mib("VmHWM")


def run_ours(work: Workload, folder: Path, steps: int, device: torch.device) -> None:
    """train.py's own parts and step."""
    from grpo.config import Config, from_dict
    from grpo.distributed import start
    from grpo.run import Run, resolve_config

    config: Config = from_dict(
        {
            "task": "jsonl",
            "num_steps": steps,
            "model": {"path": str(folder / "model")},
            "data": {"path": str(folder / "prompts.jsonl")},
            "prompt": {"shots": 0},
            "rewards": {
                "format_weight": 0.0,
                "correctness_weight": 0.0,
                "functions": ["benchmarks.letters:early_letters"],
                "require_finish": False,
            },
            "rollout": {
                "prompts_per_step": work.prompts,
                "group_size": work.group_size,
                "max_new_tokens": work.new_tokens,
                "max_sequences": work.prompts * work.group_size,
            },
            "objective": {"preset": "grpo", "beta": BETA},
            "optim": {"lr": LEARNING_RATE, "schedule": "constant", "warmup": 0.0},
            "eval": {"every": 0, "test_problems": 0},
        }
    )
    train_step = runpy.run_path(str(ROOT / "train.py"))["train_step"]
    with redirect_stdout(sys.stderr):
        (folder / "run").mkdir()
        world = start()
        run = Run(*resolve_config(config, world), world, folder / "run")
        with run.pool:
            answer(ready=True)
            for step in range(1, steps + 1):
                sys.stdin.readline()
                started = time.perf_counter()
                row = train_step(run, step)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                total, rollout = time.perf_counter() - started, run.log.timer.take()["seconds/rollout"]
                answer(step=total, rollout=rollout, reward=row["reward/early_letters"], peak_mib=peak_mib(device))


def trl_settings(work: Workload, folder: Path, steps: int, device: torch.device, *, batching: bool) -> dict:
    """Our settings, by TRL's names."""
    return {
        "output_dir": str(folder / "trl"),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta2": 0.99,
        "max_grad_norm": 1.0,
        "beta": BETA,
        "loss_type": "grpo",
        "num_generations": work.group_size,
        "per_device_train_batch_size": work.trl_batch,
        "gradient_accumulation_steps": work.prompts * work.group_size // work.trl_batch,
        "max_completion_length": work.new_tokens,
        "max_steps": steps,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
        "gradient_checkpointing": False,
        "use_transformers_continuous_batching": batching,
        "seed": 0,
        "disable_tqdm": True,
    }


def run_trl(work: Workload, folder: Path, steps: int, device: torch.device, *, batching: bool) -> None:
    """GRPOTrainer.train(), which waits for its turn before every step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds = {"rollout": 0.0}

    class Timed(GRPOTrainer):
        def _generate(self, *arguments, **options):
            with timed(seconds, "rollout", device):
                return super()._generate(*arguments, **options)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            sys.stdin.readline()
            seconds.update(rollout=0.0, started=time.perf_counter())

        def on_step_end(self, *_, **__) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds["step"] = time.perf_counter() - seconds["started"]

        def on_log(self, args, state, control, logs=None, **__) -> None:
            if "reward" in (logs or {}):
                taken = {name: seconds[name] for name in ("step", "rollout")}
                answer(**taken, reward=logs["reward"], peak_mib=peak_mib(device))

    with redirect_stdout(sys.stderr):
        rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        trainer = Timed(
            model=Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=dtype),
            reward_funcs=early_letters,
            args=GRPOConfig(**trl_settings(work, folder, steps, device, batching=batching)),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Turns()],
        )
        answer(ready=True)
        trainer.train()


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds[name] += time.perf_counter() - started


CONTENDERS = {
    OURS: run_ours,
    GENERATE: lambda *arguments: run_trl(*arguments, batching=False),
    BATCHING: lambda *arguments: run_trl(*arguments, batching=True),
}


# The referee ----------------------------------------------------------------------------------------------------------


class Contender:
    """A contender in its process."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path):
        command = [sys.executable, "-m", "benchmarks.vs_trl", "--contender", name, "--folder", str(folder)]
        command += [f"--{option}={getattr(arguments, option)}" for option in ("steps", "threads", "workload")]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
        # No attention by cuDNN: it plans anew for every length, and in `generate` that changes at every token.
        environment |= {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.name, self.rows, self.failure = name, [], ""

    def read(self) -> dict | None:
        """The next answer; None, with the reason kept, where the process has ended."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        last = [text for text in self.errors.read().splitlines() if text.strip()]
        print(f"the last output of {self.name}:", *last[-25:], sep="\n", file=sys.stderr, flush=True)
        self.failure = last[-1][:300] if last else f"ended with status {self.process.wait()}"
        return None

    def step(self) -> None:
        if not self.failure:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            row = self.read()
            if row:
                self.rows.append(row)
                print(f"  {self.name}: {row['step']:.2f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(arguments: argparse.Namespace) -> Iterator[list[Contender]]:
    """Let the contenders take turns, a step each, one at work at a time; yields all of them after each turn."""
    work, started = WORKLOADS[arguments.workload], time.perf_counter()
    names = [OURS]
    if find_spec("trl"):
        names += [GENERATE] + ([BATCHING] if arguments.continuous_batching else [])
    else:
        print("without TRL: it is not installed (benchmarks/requirements.txt)")
    with tempfile.TemporaryDirectory() as folder:
        write_model_and_prompts(work, Path(folder), arguments.steps)
        contenders = [Contender(name, arguments, Path(folder)) for name in names]
        try:
            for contender in contenders:
                contender.read()  # waits until it is ready: they start together
            for turn in range(arguments.steps):
                if turn and time.perf_counter() - started > arguments.seconds:
                    print(f"after {arguments.seconds:g} s: {turn} of {arguments.steps} steps per side")
                    break
                for contender in contenders:
                    contender.step()
                yield contenders
        finally:
            for contender in contenders:
                contender.close()


def summarise(contenders: list[Contender], work: Workload) -> dict[str, object]:
    """Medians, ratios to TRL's generate, and every raw time."""
    found = {}
    for contender in contenders:
        if contender.failure or not contender.rows:
            found[contender.name] = {"failure": contender.failure}
            continue
        columns = {key: [row[key] for row in contender.rows] for key in ("step", "rollout", "reward")}
        columns["update"] = [row["step"] - row["rollout"] for row in contender.rows]
        median = {key: statistics.median(columns[key]) for key in ("step", "rollout", "update")}
        rate = work.prompts * work.group_size / median["step"]
        found[contender.name] = {"seconds": columns, "median": median, "completions_per_second": rate}
        found[contender.name]["peak_mib"] = contender.rows[-1]["peak_mib"]
    summary: dict[str, object] = {"contenders": found}
    ours, theirs = found[OURS], found.get(GENERATE, {})
    if "median" in ours:
        summary |= {"seconds_ours": ours["median"]["step"]}
    if "median" in ours and "median" in theirs:
        summary |= {f"speedup_{key}": theirs["median"][key] / ours["median"][key] for key in ours["median"]}
        summary |= {"peak_ratio": ours["peak_mib"] / theirs["peak_mib"], "seconds_trl": theirs["median"]["step"]}
    return summary


def show(summary: dict, work: Workload) -> None:
    """The table."""
    print(
        f"{work.prompts} prompts x {work.group_size}, prompts of {work.shortest} to {work.longest} tokens, "
        f"{work.new_tokens} new, beta {BETA}; medians"
    )
    print(f"{'':<26}{'step s':>9}{'rollout s':>11}{'update s':>10}{'completions/s':>15}{'peak MiB':>10}   rewards")
    for name, entry in summary["contenders"].items():
        if "failure" in entry:
            print(f"{name:<26} failed: {entry['failure']}")
            continue
        median, rewards = entry["median"], " ".join(f"{reward:.3f}" for reward in entry["seconds"]["reward"])
        print(
            f"{name:<26}{median['step']:>9.2f}{median['rollout']:>11.2f}{median['update']:>10.2f}"
            f"{entry['completions_per_second']:>15.2f}{entry['peak_mib']:>10,.0f}   {rewards}"
        )
    if "speedup_step" in summary:
        print(
            f"a step {summary['speedup_step']:.2f}x as fast (rollout {summary['speedup_rollout']:.2f}x, update "
            f"{summary['speedup_update']:.2f}x), with {summary['peak_ratio']:.2f}x the peak memory"
        )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2, help="steps per side, in turns")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further turn after this many")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the side that is running")
    parser.add_argument("--continuous-batching", action="store_true", help="also TRL with it")
    parser.add_argument("--workload", choices=list(WORKLOADS), help="default: that of the device")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = default_device()
    arguments.workload = arguments.workload or device.type
    work = WORKLOADS[arguments.workload]
    torch.set_num_threads(arguments.threads)
    if arguments.contender:
        transformers_logging.set_verbosity_error()
        CONTENDERS[arguments.contender](work, arguments.folder, arguments.steps, device)
        return 0
    where = measured_on(device)
    for contenders in compare(arguments):
        summary = summarise(contenders, work)
        print(json.dumps(summary | where), flush=True)
    show(summary, work)
    print(json.dumps(summary | where))
    return int(any(contender.failure for contender in contenders[:2]))  # continuous batching may fail


if __name__ == "__main__":
    sys.exit(main())
