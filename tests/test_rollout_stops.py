"""Stop strings: across tokens, inside tokens, in several bytes; ids are cut backwards and decoding ends early."""

import pytest
import torch

from grpo.rollout import loop
from grpo.rollout.stops import Ending, eos_ids
from tests.rollout_helpers import EOS, PAD, byte_tokenizer, problems, sampler, syllable_tokenizer, tiny_model


def end(tokenizer, ids, *stop):
    ending = Ending(tokenizer, [EOS], stop)
    return ending.finish(ids, ending.texts([ids])[0])


def of_bytes(text):
    return list(text.encode())


def test_ids_are_kept_through_the_token_that_completes_the_stop_and_text_ends_before_it():
    ids = of_bytes("so 4\n\nQuestion: more")
    kept, text, finish = end(byte_tokenizer(), ids, "\n\nQuestion:")
    assert (bytes(kept), text, finish) == (b"so 4\n\nQuestion:", "so 4", "stop")


def test_a_token_may_complete_the_stop_and_say_more():
    tokenizer = syllable_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in ("ab", "cd", "ef", "gh")]
    assert end(tokenizer, ids, "bcde") == (ids[:3], "a", "stop")


def test_the_stop_completed_by_the_earliest_token_wins():
    assert end(byte_tokenizer(), of_bytes("one two three"), "three", "two", "e t")[:2] == (of_bytes("one t"), "on")


def test_a_stop_of_several_bytes_per_character_is_complete_with_its_last_byte():
    kept, text, finish = end(byte_tokenizer(), of_bytes("né€ end"), "€")
    assert (bytes(kept).decode(), text, finish) == ("né€", "né", "stop")


@pytest.mark.parametrize("stop", ["Question:", ("\n", "")])
def test_stops_are_a_tuple_of_texts_that_say_something(stop):
    with pytest.raises(ValueError, match="must be a tuple of non-empty strings"):
        Ending(byte_tokenizer(), [EOS], stop)


def test_without_a_stop_the_last_id_decides():
    assert end(byte_tokenizer(), [*of_bytes("two"), EOS], "three") == ([*of_bytes("two"), EOS], "two", "eos")
    assert end(byte_tokenizer(), of_bytes("two"), "three") == (of_bytes("two"), "two", "length")


def test_a_stop_before_the_end_of_sequence_token_comes_first():
    assert end(byte_tokenizer(), [*of_bytes("a#b"), EOS], "#") == (of_bytes("a#"), "a", "stop")


def test_a_stop_may_end_in_a_token_with_its_last_character_or_part_of_one_and_in_any_if_that_is_a_space():
    ending = Ending(byte_tokenizer(), [EOS], ("Question:", "€"))
    assert [token for token in range(EOS + 1) if ending.may_complete(token)] == [ord(":"), *range(0x80, 0x100)]
    assert all(map(Ending(byte_tokenizer(), [EOS], ("so ",)).may_complete, range(EOS + 1)))


def test_ids_are_cut_where_a_loop_over_all_their_beginnings_first_finds_a_stop():
    generator = torch.Generator().manual_seed(0)
    letters = torch.tensor(of_bytes("ab: €"))
    for _ in range(100):
        ids = letters[torch.randint(len(letters), (40,), generator=generator)].tolist()
        stops = [n for n in range(1, 41) if any(stop in bytes(ids[:n]) for stop in (b"a:", b"b b", "€".encode()))]
        kept, _, finish = end(byte_tokenizer(), ids, "a:", "b b", "€")
        assert (len(kept), finish) == ((stops[0], "stop") if stops else (40, "length"))


def test_a_cut_decodes_few_beginnings_and_none_twice(monkeypatch):
    ending, decoded = Ending(byte_tokenizer(), [EOS], ("Question:",)), []
    ids = of_bytes("a: b: c: d: e: f: g: Question: h")
    text, original = ending.texts([ids])[0], ending.texts
    monkeypatch.setattr(ending, "texts", lambda some: decoded.extend(map(len, some)) or original(some))
    assert bytes(ending.finish(ids, text)[0]) == b"a: b: c: d: e: f: g: Question:"
    # Of 8 colons bisection tries 4; the single tokens are looked at once, to see whether a stop may end in them.
    tried = [length for length in decoded if length > 1]
    assert len(tried) == len(set(tried)) <= 4


@pytest.mark.parametrize(
    "template, ends",
    [
        (
            "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}",
            [EOS, PAD + 2],
        ),  # ChatML
        ("{% for m in messages %}<|start|>{{ m.content }}\n<|end|>{% endfor %}", [EOS, PAD + 2]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}", [EOS]),
        ("{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}", [EOS]),
        ("<|start|>{{ messages[0].content }}", [EOS]),  # the answer is not shown
        ("{{ raise_exception('no assistant here') }}", [EOS]),
        (None, [EOS]),
    ],
)
def test_the_token_by_which_the_chat_template_closes_an_answer_ends_a_sequence(template, ends):
    """A base model with a chat template may call another token its end of sequence, as Qwen2.5 does."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = template
    assert eos_ids(tiny_model("qwen2"), tokenizer) == ends


@pytest.mark.parametrize("look_every", [1, 3, 8])
def test_stopping_early_gives_the_unstopped_completion_cut_however_rarely_one_looks(look_every, monkeypatch):
    monkeypatch.setattr(loop, "STEPS_BETWEEN_STOPS", look_every)
    model, tokenizer, made = tiny_model("qwen2"), syllable_tokenizer(), problems(9, 20, 4)
    free = sampler(model, tokenizer=tokenizer, max_new_tokens=40).generate(made, step=0)
    stop = tuple(group.completions[0].text[9:12] for group in free)  # three letters: never one token
    stopped = sampler(model, tokenizer=tokenizer, max_new_tokens=40, stop=stop).generate(made, step=0)
    reasons = set()
    for before, after in zip(free, stopped, strict=True):
        for long, short in zip(before.completions, after.completions, strict=True):
            assert short.ids == long.ids[: len(short.ids)]
            assert short.logprobs == pytest.approx(long.logprobs[: len(short.ids)], abs=1e-4)
            assert (short.ids, short.text, short.finish) == end(tokenizer, long.ids, *stop)
            reasons.add(short.finish)
    assert "stop" in reasons


def test_stopped_rows_are_not_decoded_to_the_length_limit():
    model, tokenizer, made = tiny_model("qwen2"), syllable_tokenizer(), problems(9)
    steps = []
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    free = sampler(model, tokenizer=tokenizer, group_size=1, max_new_tokens=100, temperature=0.0)
    text = free.generate(made, step=0)[0].completions[0].text
    steps.clear()
    sampler(model, tokenizer=tokenizer, group_size=1, max_new_tokens=100, temperature=0.0, stop=(text[9:12],)).generate(
        made, step=0
    )
    assert len(steps) <= 2 + 12 + loop.STEPS_BETWEEN_STOPS  # probe and prefill; 12 letters take at most 12 tokens


def test_lm_head_sees_one_position_per_row():
    model, widths = tiny_model("qwen2"), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: widths.append(tuple(inputs[0].shape[:2])))
    sampler(model, max_new_tokens=4).generate(problems(9, 30), step=0)
    assert widths == [(1, 1), (2, 1)] + [(6, 1)] * 4  # what is stored for a token is learnt first, from one
    assert torch.is_grad_enabled()
