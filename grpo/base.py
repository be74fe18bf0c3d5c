"""The embedded base model: a small tokenizer and causal LM, trained on worked solutions when first needed, and cached.

`prepare_base`, called by grpo.run if model.path is empty, returns an ordinary Hugging Face folder, so that
nothing after it needs to know where the model came from. `continue_supervised` is the baseline of the long
demo: the same supervised training on the same solutions, continued for as many seconds as GRPO took.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from grpo.config import BaseConfig, PromptConfig, RolloutConfig
from grpo.records import Problem
from grpo.rewards import score_groups
from grpo.rollout import EVALUATION, Sampler
from grpo.tasks.prompts import Prompter
from grpo.tasks.stream import ENDLESS_STRIDE
from grpo.tasks.word_problems import WordProblems

Progress = Callable[[int, int, str], None]  # done, in all, a short note

CONTEXT_LENGTH = 512
WARMUP_STEPS = 20
MAX_QUESTIONS_TRIED = 1000  # if all of these have an unseen word, give up: the search for one without might never end
CONTINUE_VALIDATIONS = 10


def build_tokenizer(task: WordProblems) -> PreTrainedTokenizerBase:
    """A byte-level BPE of about 400 tokens: one for every word of the task and one for every digit.

    It is a Qwen2Tokenizer because AutoTokenizer loads nothing else for a Qwen2 model (it would read the file of
    a simpler tokenizer without an error, and give wrong ids). Byte-level, so that every text round-trips exactly.
    """
    rng = random.Random(0)
    texts = [
        task.plain_prompt(problem.question, []) + supervised_text(problem, rng, guesses=0.5, answer_lines=1.0)
        for problem in (task.solved[i] for i in range(2000))
    ]
    untrained = Qwen2Tokenizer(pad_token="<pad>", eos_token="<eos>", unk_token="<eos>", model_max_length=CONTEXT_LENGTH)
    return untrained.train_new_from_iterator(texts, vocab_size=1000, show_progress=False)


def model_config(base: BaseConfig, *, vocab_size: int) -> Qwen2Config:
    """A Qwen2 of the configured size, with tied embeddings."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=base.hidden_size,
        num_hidden_layers=base.num_layers,
        num_attention_heads=base.num_heads,
        num_key_value_heads=base.num_heads,
        intermediate_size=base.intermediate_size,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
    )


def build_model(base: BaseConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A model of the configured size, freshly initialised from torch's global random state."""
    config = model_config(base, vocab_size=len(tokenizer))
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return Qwen2ForCausalLM(config)


def supervised_text(problem: Problem, rng: random.Random, *, guesses: float, answer_lines: float) -> str:
    """The completion to train on: the working, or with probability `guesses` the bare answer; then the answer line.

    Every text is correct. The answer line is there with probability answer_lines.
    """
    working, line = problem.solution.rsplit("\n", 1)
    body = f"I think {problem.answer}." if rng.random() < guesses else working
    return body + (f"\n{line}" if rng.random() < answer_lines else "")


@dataclass(frozen=True)
class Point:
    """Where supervised training stands after an optimizer step."""

    step: int
    seconds: float  # of training, without validation
    share: float  # of this training that is done, 0 to 1
    loss: float  # nats per completion token


class SupervisedTrainer:
    """Supervised training of one model on the worked solutions of one task.

    The solutions are those of `task.solved`, from an index that depends on the seed: a new one every
    time, or base.num_solutions of them in shuffled epochs.
    """

    def __init__(
        self,
        model: Qwen2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        base: BaseConfig,
        task: WordProblems,
        seed: int,
    ):
        self.model, self.tokenizer, self.base, self.task = model, tokenizer, base, task
        self.rng = random.Random(seed)
        prompt = PromptConfig(style="plain", shots=0)
        limits = {"context_length": CONTEXT_LENGTH, "max_new_tokens": task.level.solution_tokens}
        self.prompter = Prompter(task, prompt, tokenizer, **limits)
        self.problems = self.solved_problems(first=seed * ENDLESS_STRIDE)
        self.validation = self.prompter.ask(task.split("validation")[: base.validation_problems])

    def solved_problems(self, first: int) -> Iterator[Problem]:
        """Endless problems from index `first` of `task.solved` on, without those that have unseen words."""
        unseen = set(self.base.unseen_words)
        is_seen = lambda problem: not unseen & set(re.findall(r"\w+", problem.question))
        if not any(is_seen(self.task.solved[i]) for i in range(first, first + MAX_QUESTIONS_TRIED)):
            found = f"all of {MAX_QUESTIONS_TRIED} questions have one"
            raise ValueError(f"base.unseen_words={sorted(unseen)}: {found}; name fewer words")
        solved = filter(is_seen, (self.task.solved[i] for i in itertools.count(first)))
        if not self.base.num_solutions:
            yield from solved
        chosen = list(itertools.islice(solved, self.base.num_solutions))
        while True:
            self.rng.shuffle(chosen)
            yield from chosen

    def row(self, problem: Problem, guesses: float) -> tuple[list[int], int]:
        """Token ids of prompt and completion, and the length of the prompt."""
        prompt_ids = self.prompter(problem).prompt_ids
        text = supervised_text(problem, self.rng, guesses=guesses, answer_lines=self.base.answer_lines)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [*prompt_ids, *ids, self.tokenizer.eos_token_id], len(prompt_ids)

    def batches(self, guesses: float) -> Iterator[dict[str, Tensor]]:
        """Endless padded batches; eight at a time are drawn and sorted by length, for less padding."""
        size = self.base.batch_size
        while True:
            rows = [self.row(next(self.problems), guesses) for _ in range(8 * size)]
            rows.sort(key=lambda row: len(row[0]))
            starts = list(range(0, len(rows), size))
            self.rng.shuffle(starts)
            for start in starts:
                yield collate(rows[start : start + size], self.tokenizer.pad_token_id, self.model.device)

    def train(self, *, lr: float, guesses: float, share_done: Callable[[int, float], float]) -> Iterator[Point]:
        """A Point after every optimizer step, until `share_done(steps, seconds)` reaches 1.

        lr_t = lr * min(1, steps / WARMUP_STEPS, (1 - share done) / decay). Time that the caller spends between
        two points (validation) does not count in `seconds`.
        """
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        batches = self.batches(guesses)
        seconds = share = 0.0
        for step in itertools.count(1):
            started = time.perf_counter()
            optimizer.param_groups[0]["lr"] = lr * min(1.0, step / WARMUP_STEPS, (1 - share) / self.base.decay)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.model.device.type == "cuda"):
                loss = self.model(**next(batches)).loss  # transformers shifts the labels itself
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            seconds += time.perf_counter() - started
            share = min(share_done(step, seconds), 1.0)
            yield Point(step, seconds, share, loss.item())
            if share == 1.0:
                return

    def accuracy(self) -> float:
        """Share of the validation problems that greedy decoding gets right."""
        greedy = RolloutConfig(group_size=1, temperature=0.0, max_new_tokens=self.task.level.solution_tokens)
        sampler = Sampler(self.model, self.tokenizer, greedy, stop=(), stream=EVALUATION, seed=0)
        scores = score_groups(sampler.generate(self.validation, 0), self.task.rewards, require_finish=True)
        return scores.means()["reward/correctness"]

    def phase(
        self, name: str, progress: Progress, *, steps: int, lr: float, guesses: float, stop: float = math.inf
    ) -> dict:
        """Train for `steps` optimizer steps or until validation accuracy reaches `stop`; returns a base.json entry."""
        curve: list[tuple[int, float]] = []
        for point in self.train(lr=lr, guesses=guesses, share_done=lambda step, seconds: step / steps):
            every = self.base.validate_every
            if point.step == steps or (every and point.step % every == 0):
                curve.append((point.step, self.accuracy()))
            note = f"{name}: loss {point.loss:.2f}" + (f", validation {curve[-1][1]:.1%}" if curve else "")
            progress(point.step, steps, note)
            if curve and curve[-1][1] >= stop:
                break
        return {"phase": name, "steps": point.step, "seconds": point.seconds, "loss": point.loss, "validation": curve}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def collate(rows: list[tuple[list[int], int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Right-padded input_ids and labels [rows, longest]; prompts and padding have label -100 (no loss)."""
    input_ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=pad_id)
    labels = [torch.tensor([-100] * start + ids[start:]) for ids, start in rows]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_ids": input_ids.to(device), "labels": labels.to(device)}


def prepare_base(
    base: BaseConfig, task: WordProblems, *, seed: int, device: str, cache_dir: Path, progress: Progress
) -> Path:
    """The folder of the trained base model, made now or found in the cache. OSError if it cannot be written.

    A Hugging Face folder with `base.json` (phases, losses, seconds, validation) and, after a habit phase,
    `before_habit/`: the model that still shows its working. Written under a staging name and renamed, so a
    folder that exists is complete. Only rank 0 calls this; the others wait.
    """
    identity = json.dumps([task.name, task.version, task.data.level, asdict(base), seed])
    folder = Path(cache_dir) / f"{task.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder.parent))
    except OSError as error:
        remedy = "start from a folder that can be written to"
        raise OSError(f"cannot keep the base model in {folder.parent}: {error.strerror}; {remedy}") from error
    try:
        train_base(base, task, staging, seed=seed, device=device, progress=progress)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.exists():  # if it does, another run made it meanwhile
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def train_base(
    base: BaseConfig, task: WordProblems, folder: Path, *, seed: int, device: str, progress: Progress
) -> None:
    """Train on worked solutions, then (habit_steps > 0) teach the bad habit of answering without working; save both."""
    tokenizer = build_tokenizer(task)
    with torch.random.fork_rng():  # initialisation uses the global random state: restore the caller's
        torch.manual_seed(seed)
        model = build_model(base, tokenizer).to(device)
    trainer = SupervisedTrainer(model, tokenizer, base, task, seed)
    worked = {"steps": base.steps, "lr": base.lr, "guesses": base.guess_share, "stop": base.stop_accuracy}
    phases = [trainer.phase("worked solutions", progress, **worked)]
    if base.habit_steps:
        trainer.save(folder / "before_habit")
        habit = {"steps": base.habit_steps, "lr": base.habit_lr, "guesses": base.habit_share}
        phases.append(trainer.phase("habit", progress, **habit))
    trainer.save(folder)
    report = {"task": task.name, "version": task.version, "level": task.data.level, "seed": seed}
    report |= {"base": asdict(base), "phases": phases}
    (folder / "base.json").write_text(json.dumps(report, indent=2) + "\n")


def continue_supervised(
    folder: Path, base: BaseConfig, task: WordProblems, *, seconds: float, seed: int, device: str, progress: Progress
) -> tuple[Qwen2ForCausalLM, list[tuple[float, float]]]:
    """Continue the supervised training of `folder`'s model for `seconds`, on the same solutions: GRPO's baseline.

    Returns the model at its best validation and the curve of (seconds, validation accuracy), from 0 on. As for
    GRPO: a fresh optimizer, a warm-up, validation not counted in the time, the best of the validated models.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    trainer = SupervisedTrainer(model, AutoTokenizer.from_pretrained(folder), base, task, seed)
    curve, best = [(0.0, trainer.accuracy())], copy.deepcopy(model.state_dict())
    share_done = lambda step, spent: spent / seconds
    for point in trainer.train(lr=base.continue_lr, guesses=base.guess_share, share_done=share_done):
        if point.share >= len(curve) / CONTINUE_VALIDATIONS:
            accuracy = trainer.accuracy()
            if accuracy > max(seen for _, seen in curve):
                best = copy.deepcopy(model.state_dict())
            curve.append((point.seconds, accuracy))
        progress(round(point.seconds), round(seconds), f"supervised training continued: validation {curve[-1][1]:.1%}")
    model.load_state_dict(best)
    return model, curve


def describe(folder: Path) -> str:
    """The results in base.json as text, a line for each phase."""
    report = json.loads((folder / "base.json").read_text())
    lines = [f"embedded base model: {folder}"]
    for phase in report["phases"]:
        accuracy = phase["validation"][-1][1]
        work = f"{phase['steps']} steps, {phase['seconds']:.1f} s, loss {phase['loss']:.3f}"
        lines.append(f"  {phase['phase']}: {work}, validation {accuracy:.1%}")
    return "\n".join(lines)
