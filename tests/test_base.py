"""The embedded base model: its tokenizer, its supervised training, its cache and the rival of the long demo."""

import itertools
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo import base as base_room
from grpo.base import SupervisedTrainer, build_model, build_tokenizer, collate, continue_supervised, prepare_base
from grpo.config import BaseConfig, Config, DataConfig, PromptConfig, RewardsConfig
from grpo.dry_run import model_facts
from grpo.records import Completion, Group, Problem
from grpo.rollout import EVALUATION
from grpo.tasks import make_task

TINY = BaseConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    num_solutions=5,
    steps=4,
    batch_size=4,
    lr=1e-2,
    habit_steps=2,
    validate_every=2,
    validation_problems=4,
)


@pytest.fixture(scope="module")
def task():
    return make_task("word_problems", DataConfig(), RewardsConfig())


@pytest.fixture(scope="module")
def tokenizer(task):
    return build_tokenizer(task)


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    return prepare(task, tmp_path_factory.mktemp("cache"))


def prepare(task, cache_dir, base=TINY, seed=0):
    return prepare_base(
        base, task, seed=seed, device="cpu", cache_dir=cache_dir, progress=lambda done, total, note: None
    )


def supervisor_of(task, tokenizer, base=TINY, seed=0):
    torch.manual_seed(seed)
    return SupervisedTrainer(build_model(base, tokenizer), tokenizer, base, task, seed)


@pytest.mark.parametrize("num_solutions", [20, 0])
def test_supervised_training_sees_no_question_with_an_unseen_word(task, tokenizer, num_solutions):
    def questions(**changes):
        supervisor = supervisor_of(task, tokenizer, replace(TINY, num_solutions=num_solutions, **changes))
        return [problem.question for problem in itertools.islice(supervisor.problems, 60)]

    assert not any(" loses " in text or " sells " in text for text in questions(unseen_words=("loses", "sells")))
    assert sum(" loses " in text or " sells " in text for text in questions()) > 15
    assert any("loses" in text for text in questions(unseen_words=("lose",))), "words, not parts of words"
    with pytest.raises(ValueError, match=r"base.unseen_words=\['How'\]: all of 1000 questions have one"):
        questions(unseen_words=("How",))


def test_every_test_problem_comes_back_exactly_through_the_tokenizer(task, tokenizer):
    for problem in task.split("test"):
        text = task.plain_prompt(problem.question, task.exemplars[:1]) + problem.solution
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_text_that_the_task_never_says_comes_back_exactly_too(tokenizer):
    text = "Ωmega pays $1,234.50,\tthen 7 %\n\n\nProblem:"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_level_says_how_many_tokens_its_prompts_and_solutions_take(level):
    task = make_task("word_problems", DataConfig(level=level), RewardsConfig())
    tokenizer, problems = build_tokenizer(task), [task.solved[i] for i in range(1000)]
    prompts = [len(tokenizer(task.plain_prompt(problem.question, [])).input_ids) for problem in problems]
    longest = max(len(tokenizer(problem.solution).input_ids) + 1 for problem in problems)
    assert sum(prompts) / 1000 == pytest.approx(task.level.prompt_tokens, abs=1)
    assert longest < task.level.solution_tokens < 1.3 * longest


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_dry_run_takes_prompts_with_exemplars_to_be_about_as_long_as_they_are(level):
    config = Config(data=DataConfig(level=level), prompt=PromptConfig(shots=8))
    task = make_task("word_problems", config.data, config.rewards)
    prompts = [task.plain_prompt(task.solved[i].question, task.exemplars) for i in range(100)]
    mean = sum(map(len, build_tokenizer(task)(prompts).input_ids)) / 100
    assert model_facts(config, torch.device("cpu")).prompt_tokens == pytest.approx(mean, rel=0.2)


def test_two_levels_have_two_models_in_the_cache(task, folder):
    harder = make_task("word_problems", DataConfig(level=2), RewardsConfig())
    assert prepare(harder, folder.parent) != folder == prepare(task, folder.parent)


def test_words_are_one_token_and_digits_are_split(tokenizer):
    tokens = [tokenizer.decode([i]) for i in tokenizer(" Leo has 12 stamps.\n5+12=17").input_ids]
    assert tokens == [" Leo", " has", " ", "1", "2", " stamps", ".\n", "5", "+", "1", "2", "=", "1", "7"]


@pytest.mark.parametrize(
    ("guesses", "answer_lines", "text"),
    [
        (0.0, 1.0, "3*4=12\n12+1=13\n#### The final answer is 13"),
        (0.0, 0.0, "3*4=12\n12+1=13"),
        (1.0, 1.0, "I think 13.\n#### The final answer is 13"),
    ],
)
def test_a_supervised_text_shows_its_working_or_guesses(guesses, answer_lines, text):
    solution = "3*4=12\n12+1=13\n#### The final answer is 13"
    problem = Problem(id="", question="", answer="13", solution=solution)
    shares = {"guesses": guesses, "answer_lines": answer_lines}
    assert base_room.supervised_text(problem, random.Random(0), **shares) == text


def test_only_completions_have_labels():
    batch = collate([([5, 6, 7, 8], 2), ([5, 6, 7], 1)], 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 7, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 6, 7, -100]]


def test_batches_are_as_large_as_asked_and_each_of_like_lengths(task, tokenizer):
    batches = list(itertools.islice(supervisor_of(task, tokenizer, replace(TINY, num_solutions=0)).batches(0.0), 8))
    lengths = sorted([(row != tokenizer.pad_token_id).sum().item() for row in batch["input_ids"]] for batch in batches)
    assert [len(batch) for batch in lengths] == [TINY.batch_size] * 8
    assert all(max(shorter) <= min(longer) for shorter, longer in itertools.pairwise(lengths))


def test_accuracy_is_of_greedy_completions_that_end(task, tokenizer, monkeypatch):
    said = iter([("{}", "eos"), ("{}", "stop"), ("{}", "length"), ("no idea", "eos")])

    class Scripted:
        def __init__(self, model, tokenizer, rollout, **options):
            asked = (rollout.temperature, rollout.group_size, rollout.max_new_tokens, options["stream"])
            assert asked == (0, 1, task.level.solution_tokens, EVALUATION)

        def generate(self, problems, step):
            made = [(problem, *next(said)) for problem in problems]
            return [Group(p, [Completion([3], [-1.0], text.format(p.solution), end, 0)], step) for p, text, end in made]

    monkeypatch.setattr(base_room, "Sampler", Scripted)
    assert supervisor_of(task, tokenizer).accuracy() == 2 / 4
    assert next(said, None) is None, "as many as are configured"


def test_a_fixed_number_of_solutions_is_all_that_training_sees_and_seeds_share_none(task, tokenizer):
    seen = [{p.id for p in itertools.islice(supervisor_of(task, tokenizer, seed=s).problems, 50)} for s in (0, 1)]
    assert [len(ids) for ids in seen] == [5, 5]
    assert not seen[0] & seen[1]


def test_without_a_fixed_number_no_solution_is_seen_twice(task, tokenizer):
    endless = supervisor_of(task, tokenizer, BaseConfig(**{**vars(TINY), "num_solutions": 0})).problems
    assert len({problem.id for problem in itertools.islice(endless, 50)}) == 50


def test_the_learning_rate_warms_up_and_decays_to_nearly_nothing(task, tokenizer, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    supervisor = supervisor_of(task, tokenizer, BaseConfig(**{**vars(TINY), "decay": 0.5}))
    list(supervisor.train(lr=1.0, guesses=0.0, share_done=lambda step, seconds: step / 40))
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.15])  # 1/20 a step
    assert rates[19:21] == [1.0, 1.0]
    assert rates[-2:] == pytest.approx([0.1, 0.05])  # 2/40 and 1/40 of the work are left, over a decay of half of it


def test_supervised_training_learns_its_solutions_by_heart(task, tokenizer):
    supervisor = supervisor_of(task, tokenizer, BaseConfig(**{**vars(TINY), "hidden_size": 32}))
    points = list(supervisor.train(lr=2e-2, guesses=0.0, share_done=lambda step, seconds: step / 200))
    assert points[0].loss > 5 and points[-1].loss < 0.3
    assert [point.step for point in points] == list(range(1, 201))


def test_the_same_seed_gives_the_same_model_to_the_bit_and_another_seed_another_folder(task, folder, tmp_path):
    again, other = prepare(task, tmp_path), prepare(task, tmp_path, seed=1)
    assert again.name == folder.name != other.name
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_training_leaves_the_callers_random_state_as_it_was(task, tmp_path):
    before = torch.get_rng_state()
    prepare(task, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_is_named_by_all_that_the_model_depends_on(task, tmp_path, monkeypatch):
    monkeypatch.setattr(base_room, "train_base", lambda *_, **__: None)
    harder = make_task("word_problems", DataConfig(level=2), RewardsConfig())
    folders = [prepare(task, tmp_path), prepare(task, tmp_path, seed=1), prepare(harder, tmp_path)]
    folders += [prepare(task, tmp_path, replace(TINY, habit_lr=1e-5))]
    monkeypatch.setattr(type(task), "version", task.version + 1)
    folders += [prepare(task, tmp_path)]
    assert len(set(folders)) == 5


def test_a_cached_model_is_not_trained_again(task, folder, monkeypatch):
    monkeypatch.setattr(base_room, "train_base", lambda *_, **__: pytest.fail("trained again"))
    assert prepare(task, folder.parent) == folder


def test_of_two_runs_that_make_the_same_model_the_second_takes_what_the_first_made(task, folder, tmp_path, monkeypatch):
    train = base_room.train_base

    def beaten(*arguments, **options):
        train(*arguments, **options)
        shutil.copytree(folder, tmp_path / folder.name)

    monkeypatch.setattr(base_room, "train_base", beaten)
    assert prepare(task, tmp_path) == tmp_path / folder.name
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_an_interrupted_training_leaves_nothing_behind(task, tmp_path, monkeypatch):
    phase = SupervisedTrainer.phase

    def interrupted(self, name, *arguments, **options):
        if name == "habit":
            raise KeyboardInterrupt
        return phase(self, name, *arguments, **options)

    monkeypatch.setattr(SupervisedTrainer, "phase", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(task, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_cannot_be_written_the_remedy_is_named(task, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match="cannot keep the base model in .*cache: File exists; .*folder that can be writ"):
        prepare(task, tmp_path / "cache")


def test_the_folder_is_a_hugging_face_model_with_the_tokenizer_that_it_was_trained_with(folder, task, tokenizer):
    text = task.plain_prompt(task.split("test")[0].question, [])
    reloaded = AutoTokenizer.from_pretrained(folder)
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    assert (reloaded.eos_token_id, reloaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    model, before_habit = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, folder / "before_habit"))
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert not torch.equal(model.model.embed_tokens.weight, before_habit.model.embed_tokens.weight)


def test_the_report_says_what_each_phase_did(folder):
    worked, habit = json.loads((folder / "base.json").read_text())["phases"]
    assert (worked["phase"], worked["steps"], habit["phase"], habit["steps"]) == ("worked solutions", 4, "habit", 2)
    assert [step for step, _ in worked["validation"]] == [2, 4]


@pytest.mark.parametrize(("every", "validated"), [(3, [3, 4]), (2, [2, 4]), (0, [4])])
def test_a_phase_is_validated_when_it_is_due_and_at_its_end(task, tokenizer, every, validated, monkeypatch):
    monkeypatch.setattr(SupervisedTrainer, "accuracy", lambda self: 0.5)
    settings = {"steps": 4, "lr": TINY.lr, "guesses": 0.0}
    supervisor = supervisor_of(task, tokenizer, replace(TINY, validate_every=every))
    phase = supervisor.phase("worked", lambda done, total, note: None, **settings)
    assert phase["validation"] == [(step, 0.5) for step in validated]


def test_every_phase_has_a_rate_and_a_share_of_guesses_of_its_own(task, tmp_path, monkeypatch):
    train, seen = SupervisedTrainer.train, []

    def noted(self, *, lr, guesses, share_done):
        seen.append((lr, guesses))
        yield from train(self, lr=lr, guesses=guesses, share_done=share_done)

    monkeypatch.setattr(SupervisedTrainer, "train", noted)
    monkeypatch.setattr(SupervisedTrainer, "accuracy", lambda self: 0.5)
    odd = replace(TINY, lr=0.01, guess_share=0.1, habit_lr=0.02, habit_share=0.2, continue_lr=0.03)
    folder = prepare(task, tmp_path, odd)
    how = {"seconds": 1e-9, "seed": 0, "device": "cpu", "progress": lambda done, total, note: None}
    continue_supervised(folder, odd, task, **how)
    assert seen == [(0.01, 0.1), (0.02, 0.2), (0.03, 0.1)]


def test_validation_stops_a_phase_early(task, tokenizer):
    settings = {"steps": TINY.steps, "lr": TINY.lr, "guesses": 0.0, "stop": 0.0}
    phase = supervisor_of(task, tokenizer).phase("worked", lambda done, total, note: None, **settings)
    assert phase["steps"] == TINY.validate_every < TINY.steps


def test_continued_training_spends_the_seconds_given_and_returns_the_best_validated_model(task, folder, monkeypatch):
    accuracies = iter([0.1, *[0.2] * 4, 0.9, *[0.3] * 20])
    weights = []

    def accuracy(self):
        weights.append(self.model.model.embed_tokens.weight.detach().clone())
        return next(accuracies)

    monkeypatch.setattr(SupervisedTrainer, "accuracy", accuracy)
    files = (folder / "model.safetensors").read_bytes()
    model, curve = continue_supervised(
        folder, TINY, task, seconds=0.5, seed=0, device="cpu", progress=lambda done, total, note: None
    )
    assert curve[0] == (0.0, 0.1) and 0.5 <= curve[-1][0] < 1.0
    best = max(range(len(curve)), key=lambda i: curve[i][1])
    assert curve[best][1] == 0.9
    assert torch.equal(model.model.embed_tokens.weight, weights[best])
    assert not torch.equal(weights[0], weights[best])
    assert (folder / "model.safetensors").read_bytes() == files
