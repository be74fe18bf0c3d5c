"""The prompter: a Problem goes in, the same Problem with its prompt text and token ids comes out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from grpo.config import PromptConfig
from grpo.records import Problem
from grpo.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDLESS_POOL = 10_000  # exemplars from an endless training split come from its first problems
TOKENIZE_BATCH = 256  # prompts a call, in which a tokenizer takes some hundred bytes of memory a token
QUESTIONS_TRIED = 64  # of a split, for length: the longest in tokens (in characters, Chinese ones would seem short)


class Prompter:
    """Asks a task's problems in the style, and with the exemplars, of one prompt config.

    The exemplars are drawn once and kept, so a prompt depends on the config and on its problem alone.
    """

    def __init__(
        self,
        task: Task,
        prompt: PromptConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        max_new_tokens: int,
    ):
        if prompt.style == "chat" and not tokenizer.chat_template:
            raise ValueError(
                "prompt.style=chat, but the tokenizer has no chat template; "
                "use --prompt.style plain, or an instruct model"
            )
        self.task, self.prompt, self.tokenizer = task, prompt, tokenizer
        self.context_length, self.max_new_tokens = context_length, max_new_tokens
        self.stop_strings = task.stop_strings if prompt.style == "plain" else ()
        self._template_options = _read_options(prompt.template_options)
        self._candidates = _draw_exemplars(task, prompt)

    def __call__(self, problem: Problem) -> Problem:
        """The problem with `prompt` and `prompt_ids`; ValueError where no room is left for the completion."""
        return self.ask([problem])[0]

    def ask(self, problems: Sequence[Problem]) -> list[Problem]:
        """As __call__, for several problems, which are tokenized together."""
        asked = []
        for problem, (text, ids) in zip(problems, self._prompts(problems), strict=True):
            if not self._leaves_room(ids):
                raise ValueError(
                    f"problem {problem.id}: a prompt of {len(ids)} tokens and max_new_tokens={self.max_new_tokens} "
                    f"exceed the model's context of {self.context_length}; lower max_new_tokens or "
                    f"shots={self.prompt.shots}, or leave such problems out: --data.drop-overlong"
                )
            asked.append(replace(problem, prompt=text, prompt_ids=tuple(ids)))
        return asked

    def _leaves_room(self, ids: Sequence[int]) -> bool:
        return len(ids) + self.max_new_tokens <= self.context_length

    def _prompts(self, problems: Sequence[Problem]) -> Iterator[tuple[str, list[int]]]:
        """Text and token ids of each prompt, however long."""
        is_plain, eos = self.prompt.style == "plain", self.tokenizer.eos_token_id
        texts = map(self._plain if is_plain else self._chat, problems)
        for text, ids in self._encoded(texts, add_special_tokens=is_plain):  # a chat template has written its own
            if is_plain and len(ids) > 1 and ids[-1] == eos and not text.endswith(self.tokenizer.eos_token):
                ids = ids[:-1]  # a tokenizer with add_eos_token closes every text, but the completion is still to come
            yield text, ids

    def _encoded(self, texts: Iterable[str], **how: bool) -> Iterator[tuple[str, list[int]]]:
        """Each text and its token ids; many are tokenized together, because a tokenizer does so on all cores."""
        texts = iter(texts)
        while some := list(islice(texts, TOKENIZE_BATCH)):
            yield from zip(some, self.tokenizer(some, **how)["input_ids"], strict=True)

    def _shots(self, problem: Problem) -> list[Problem]:
        return [shot for shot in self._candidates if shot.question != problem.question][: self.prompt.shots]

    def _plain(self, problem: Problem) -> str:
        text = self.task.plain_prompt(problem.question, self._shots(problem))
        if not isinstance(text, str):
            raise ValueError(f"plain_prompt of task {self.task.name!r} returned {text!r:.80}; return the prompt's text")
        return text

    def _chat(self, problem: Problem) -> str:
        messages, how = _messages(self.task, problem, self._shots(problem)), {"add_generation_prompt": True}
        try:
            return self.tokenizer.apply_chat_template(messages, **how, tokenize=False, **self._template_options)
        except Exception as error:  # a template may raise anything, and some do so on purpose
            message = f"the tokenizer's chat template failed on problem {problem.id}: {error}"
            raise ValueError(f"{message}; use --prompt.style plain, or another number of shots") from error

    def fitting(
        self, problems: Sequence[Problem], *, drop: bool = False, say: Callable[[str], None] = print
    ) -> Sequence[Problem]:
        """The problems, after a check that their prompts leave room for the completion. ValueError for one that does
        not; with `drop` such problems are left out instead, and `say` is told how many.

        Without `drop` only the longest questions are tried, of an endless split the first ones.
        """
        is_endless = getattr(problems, "endless", False)
        pool = [problems[i] for i in range(QUESTIONS_TRIED)] if is_endless else problems
        num_bytes = lambda problem: len(problem.question.encode())
        if not pool:
            return problems
        # No token is less than a byte: what is short in bytes need not be tokenized, which takes minutes for a million.
        # Around a question stand the exemplars or, if it is one of them itself, another in its place: these cases have
        # all that can surround one.
        cases = [min(pool, key=num_bytes), *self._candidates]
        room = self.context_length - self.max_new_tokens - max(len(ids) for _, ids in self._prompts(cases))
        is_short = lambda problem: num_bytes(problem) <= room
        doubtful = [problem for problem in pool if not is_short(problem)]
        if drop and not is_endless:
            kept, overlong, prompts = [], [], self._prompts(doubtful)
            for problem in pool:
                fits = is_short(problem) or self._leaves_room(next(prompts)[1])
                (kept if fits else overlong).append(problem)
            if overlong and not kept:
                self(overlong[0])  # raises, and says what does not fit
            if overlong:
                why = f"their prompts leave no room for max_new_tokens={self.max_new_tokens} in the model's context"
                say(f"left out {len(overlong)} of {len(pool)} problems ({overlong[0].id} is the first): {why}")
            return kept
        num_tokens = [len(ids) for _, ids in self._encoded(problem.question for problem in doubtful)]
        order = sorted(range(len(doubtful)), key=num_tokens.__getitem__, reverse=True)
        self.ask([doubtful[i] for i in order[:QUESTIONS_TRIED]])
        return problems


def _read_options(options: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for the chat template. ValueError for what is not name=value."""
    found = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            message = f"prompt.template_options: {option!r} is not name=value with a JSON value"
            raise ValueError(f'{message}; write enable_thinking=false or date="today"') from None
    return found


def _messages(task: Task, problem: Problem, shots: Sequence[Problem]) -> list[dict[str, str]]:
    """Shots as earlier turns; the instruction opens the first, as not every template knows a system role."""
    messages = []
    for shot in shots:
        messages += [{"role": "user", "content": shot.question}, {"role": "assistant", "content": shot.solution}]
    messages.append({"role": "user", "content": problem.question})
    messages[0]["content"] = "\n\n".join(filter(None, [task.instruction, messages[0]["content"]]))
    return messages


def _draw_exemplars(task: Task, prompt: PromptConfig) -> list[Problem]:
    """The built-in exemplars; or random ones from the training split with questions that differ, one more than asked
    for, because the problem itself may be among them."""
    if prompt.shots == 0:
        return []
    if prompt.exemplars == "builtin":
        needed, candidates = prompt.shots, list(task.exemplars)
    else:
        needed, train, by_question = prompt.shots + 1, task.split("train"), {}
        size = ENDLESS_POOL if getattr(train, "endless", False) else len(train)
        for i in random.Random(prompt.exemplar_seed).sample(range(size), size):
            if len(by_question) < needed:
                by_question.setdefault(train[i].question, train[i])
        candidates = list(by_question.values())
    if len(candidates) < needed:
        raise ValueError(
            f"prompt.shots={prompt.shots} needs {needed} exemplars; task {task.name!r} has {len(candidates)} "
            f"({prompt.exemplars}); use fewer shots"
        )
    return candidates
