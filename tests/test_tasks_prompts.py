"""Prompts: exact text and ids, plain and chat; exemplars never give the problem itself away."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo.config import PromptConfig
from grpo.records import Problem
from grpo.rewards import format_reward, parse_number, score_texts
from grpo.rewards.runner import weighted_total
from grpo.tasks import Task, prompts
from grpo.tasks.gsm8k import EXEMPLARS
from grpo.tasks.prompts import Prompter

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Sums(Task):
    name, instruction, exemplars = "sums", "Add.", EXEMPLARS

    def load(self, split):
        """Twelve problems of which two ask the same question."""
        return [Problem(f"{split}/{i}", f"{i % 11} + 1?", str(i % 11 + 1), f"It is {i % 11 + 1}.") for i in range(12)]


class EndlessSums(Sums):
    class Split:
        endless = True

        def __getitem__(self, i):
            return Problem(str(i), f"{i} + 1?", str(i + 1), f"It is {i + 1}.")

    def load(self, split):
        return self.Split()


def test_only_a_training_split_may_be_endless():
    task = EndlessSums()
    assert task.split("train")[10**9].answer == "1000000001"
    with pytest.raises(ValueError, match="validation split of task 'sums' is endless; only the training split may be"):
        task.split("validation")


@pytest.mark.parametrize(
    "returned", [None, iter([]), [{"question": "?"}], [Problem("0", "?", "4"), Problem("1", "?", 4)]]
)
def test_what_load_must_return_is_said(returned, monkeypatch):
    monkeypatch.setattr(Sums, "load", lambda self, split: returned)
    with pytest.raises(ValueError, match=r"load\('train'\) of task 'sums'.*Problem"):
        Sums().split("train")


def test_a_prompt_is_text(tokenizer, monkeypatch):
    monkeypatch.setattr(Sums, "plain_prompt", lambda *_: None)
    with pytest.raises(ValueError, match="plain_prompt of task 'sums' returned None; return the prompt's text"):
        prompter(Sums(), tokenizer)(Problem("0", "2 + 2?", "4"))


@pytest.fixture(scope="module")
def tokenizer():
    """Byte by byte, and like many real ones it opens every text with a special token."""
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def prompter(task, tokenizer, context_length=4096, **prompt):
    return Prompter(task, PromptConfig(**prompt), tokenizer, context_length=context_length, max_new_tokens=10)


def test_a_plain_prompt_is_instruction_exemplars_and_question(tokenizer):
    ask = prompter(Sums(), tokenizer, shots=1)
    asked = ask(Problem("test/3", "2 + 2?", "4", index=7))
    shot = f"Question: {EXEMPLARS[0].question}\nAnswer: {EXEMPLARS[0].solution}"
    assert asked.prompt == f"Add.\n\n{shot}\n\nQuestion: 2 + 2?\nAnswer:"
    assert tokenizer.decode(asked.prompt_ids) == "<s>" + asked.prompt  # special tokens as the tokenizer adds them
    assert (asked.id, asked.answer, asked.index) == ("test/3", "4", 7)
    assert ask.stop_strings == ("\n\nQuestion:",)


@pytest.mark.parametrize("closing, ends", [("</s>", "2 + 2?\nAnswer:"), ("", "2 + 2?\nAnswer:</s>")])
def test_a_plain_prompt_goes_on_where_the_tokenizer_closes_every_text(closing, ends, monkeypatch):
    """An end of sequence that the prompt itself asks for stays."""
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    special = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=f"<s> $A {closing}".strip(), special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    plain = Sums().plain_prompt
    monkeypatch.setattr(Sums, "plain_prompt", lambda self, *args: plain(*args) + ("" if closing else "</s>"))
    asked = prompter(Sums(), tokenizer, shots=0)(Problem("0", "2 + 2?", "4"))
    assert tokenizer.decode(asked.prompt_ids) == f"<s>Add.\n\nQuestion: {ends}"


def test_no_shots_leave_instruction_and_question(tokenizer):
    assert (
        prompter(Sums(), tokenizer, shots=0)(Problem("0", "2 + 2?", "4")).prompt == "Add.\n\nQuestion: 2 + 2?\nAnswer:"
    )


def test_a_chat_prompt_has_shots_as_earlier_turns_and_one_special_token(chat_tokenizer):
    ask = prompter(Sums(), chat_tokenizer, style="chat", shots=2)
    asked = ask(Problem("0", "2 + 2?", "4"))
    first, second = EXEMPLARS[:2]
    assert asked.prompt == (
        f"<s>[user]Add.\n\n{first.question}[assistant]{first.solution}"
        f"[user]{second.question}[assistant]{second.solution}[user]2 + 2?[assistant]"
    )
    ids = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add.\n\n2 + 2?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    alone = prompter(Sums(), chat_tokenizer, style="chat", shots=0)(Problem("0", "2 + 2?", "4"))
    assert list(alone.prompt_ids) == ids and ids.count(chat_tokenizer.bos_token_id) == 1
    assert ask.stop_strings == ()


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_problems_that_are_asked_together_are_asked_as_each_alone(chat_tokenizer, style, monkeypatch):
    monkeypatch.setattr(prompts, "TOKENIZE_BATCH", 5)
    ask, problems = prompter(Sums(), chat_tokenizer, style=style, shots=2), Sums().split("test")
    assert ask.ask(problems) == [ask(problem) for problem in problems] and ask.ask([]) == []


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no chat template; use --prompt.style plain"):
        prompter(Sums(), tokenizer, style="chat")


def test_a_chat_template_is_told_what_the_config_says(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ thinking is defined and thinking }}{{ day }}{{ messages[0]['content'][-6:] }}"
    problem, settings = Problem("0", "2 + 2?", "4"), {"style": "chat", "shots": 0}
    told = prompter(Sums(), chat_tokenizer, **settings, template_options=("thinking=true", 'day="a=b"'))
    assert told(problem).prompt == "Truea=b2 + 2?"
    assert prompter(Sums(), chat_tokenizer, **settings)(problem).prompt == "False2 + 2?"


@pytest.mark.parametrize("option", ["thinking=False", "thinking"])
def test_an_option_that_is_not_json_is_refused(chat_tokenizer, option):
    message = f"'{option}' is not name=value with a JSON value; write enable_thinking=false or "
    with pytest.raises(ValueError, match=message):
        prompter(Sums(), chat_tokenizer, style="chat", template_options=(option,))


def test_a_chat_template_that_refuses_the_messages_is_answered_with_the_way_out(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('one turn only') if messages | length > 1 }}"
    chat = prompter(Sums(), chat_tokenizer, style="chat", shots=2)
    with pytest.raises(ValueError, match="failed on problem .*: one turn only; use --prompt.style plain, or another"):
        chat(Sums().split("test")[0])


@pytest.mark.parametrize("task", [Sums(), EndlessSums()])
def test_drawn_exemplars_never_hold_the_problem_itself_and_do_not_depend_on_other_problems(tokenizer, task):
    ask = prompter(task, tokenizer, shots=8, exemplars="train", exemplar_seed=3)
    split = task.split("train")
    first = ask(split[0]).prompt
    for problem in [split[i] for i in range(12)]:
        prompt = ask(problem).prompt
        assert prompt.count(f"Question: {problem.question}\n") == 1
        assert prompt.count("\nAnswer: It is ") == 8
        assert f"Answer: {problem.solution}" not in prompt.split("\n")
    assert (
        ask(split[0]).prompt
        == first
        == prompter(task, tokenizer, shots=8, exemplars="train", exemplar_seed=3)(split[0]).prompt
    )
    assert first != prompter(task, tokenizer, shots=8, exemplars="train", exemplar_seed=4)(split[0]).prompt


def test_the_test_split_is_never_asked_for_exemplars(tokenizer):
    class Guarded(Sums):
        def load(self, split):
            assert split == "train"
            return super().load(split)

    prompter(Guarded(), tokenizer, shots=4, exemplars="train")


def test_more_exemplars_than_there_are_is_a_clear_error(tokenizer):
    with pytest.raises(ValueError, match=r"shots=9 needs 9 exemplars; task 'sums' has 8 \(builtin\)"):
        prompter(Sums(), tokenizer, shots=9)
    with pytest.raises(ValueError, match=r"shots=11 needs 12 exemplars; task 'sums' has 11 \(train\)"):
        prompter(Sums(), tokenizer, shots=11, exemplars="train")


def test_a_prompt_that_leaves_no_room_names_the_problem_and_the_sizes(tokenizer):
    problem = Problem("test/9", "2 + 2?", "4")
    length = len(prompter(Sums(), tokenizer, shots=0)(problem).prompt_ids)
    assert prompter(Sums(), tokenizer, shots=0, context_length=length + 10)(problem).prompt
    with pytest.raises(
        ValueError,
        match=f"test/9: a prompt of {length} tokens and max_new_tokens=10.*{length + 9}; lower .* or shots=0, or leave",
    ):
        prompter(Sums(), tokenizer, shots=0, context_length=length + 9)(problem)


def test_a_split_is_refused_for_its_longest_question_in_tokens_not_in_characters(tokenizer):
    problems = [Problem(f"test/{i}", "a" * 40, "4") for i in range(100)] + [
        Problem("test/100", "\N{CJK UNIFIED IDEOGRAPH-6570}" * 30, "4")
    ]
    limit = len(prompter(Sums(), tokenizer, shots=0)(problems[0]).prompt_ids) + 10
    ask = prompter(Sums(), tokenizer, shots=0, context_length=limit)
    assert ask.fitting(problems[:100]) == problems[:100]
    with pytest.raises(ValueError, match="test/100: a prompt of"):  # 30 characters, 90 tokens
        ask.fitting(problems)


def test_problems_that_leave_no_room_are_left_out_and_counted_where_that_is_asked_for(tokenizer):
    sizes = (10, 300, 60, 61, 10, 400)
    problems, said = [Problem(f"train/{i}", "a" * size, "4") for i, size in enumerate(sizes)], []
    limit = len(prompter(Sums(), tokenizer, shots=0)(problems[2]).prompt_ids) + 10
    ask = prompter(Sums(), tokenizer, shots=0, context_length=limit)
    kept = ask.fitting(problems, drop=True, say=said.append)
    assert [problem.id for problem in kept] == ["train/0", "train/2", "train/4"]
    assert said == [
        "left out 3 of 6 problems (train/1 is the first): their prompts leave no room for max_new_tokens=10 in the "
        "model's context"
    ]
    assert ask.fitting(kept, drop=True, say=said.append) == kept and len(said) == 1
    with pytest.raises(ValueError, match="train/1: a prompt of"):  # none fits
        ask.fitting([problems[1], problems[5]], drop=True)


def test_an_endless_split_stays_endless_where_problems_may_be_left_out(tokenizer):
    split = EndlessSums().split("train")
    assert prompter(EndlessSums(), tokenizer, shots=0).fitting(split, drop=True) is split


def test_a_split_of_short_questions_is_checked_without_tokenizing_each(tokenizer, monkeypatch):
    ask, tokenized, tokenize = prompter(Sums(), tokenizer, shots=0, context_length=200), [], type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **how: tokenized.append(text) or tokenize(self, text, **how)
    )
    problems = [Problem(f"test/{i}", f"{i} + 1?", str(i + 1)) for i in range(1000)]
    assert ask.fitting(problems) == problems
    assert len(tokenized) == 1
    assert ask.fitting([]) == []


def test_the_built_in_exemplars_earn_full_reward_and_differ_in_kind():
    assert len(EXEMPLARS) == len({shot.question for shot in EXEMPLARS}) == 8
    solutions, answers = [shot.solution for shot in EXEMPLARS], [shot.answer for shot in EXEMPLARS]
    rows = score_texts(solutions, {"answer": answers}, Sums().rewards)
    assert [weighted_total(row, Sums().rewards) for row in rows] == [1.5] * 8
    assert format_reward(solutions) == [1.0] * 8
    assert all(any(mark in "".join(answers) for mark in kind) for kind in ("$", ",", "%", "-"))
    assert sum(parse_number(answer) < 0 for answer in answers) == 1


def test_the_equations_of_the_built_in_exemplars_hold():
    import re

    pattern = re.compile(r"(\d[\d,.]*) ([-+*/]) (\d[\d,.]*) = \$?(-?\d(?:[\d,.]*\d)?)")
    found = [match for shot in EXEMPLARS for match in pattern.findall(shot.solution)]
    values = [(*(float(number.replace(",", "")) for number in (a, b, c)), sign) for a, sign, b, c in found]
    results = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}
    assert len(found) == sum(shot.solution.count(" = ") for shot in EXEMPLARS)
    assert all(results[sign](a, b) == c for a, b, c, sign in values)
