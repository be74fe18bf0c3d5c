"""Where a completion ends: an end-of-sequence token, a stop string, or the length limit."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import suppress
from functools import cache, partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a sequence according to the tokenizer, its chat template, the generation config or the model
    config; ValueError if there is none."""
    generation = getattr(model, "generation_config", None)
    found = turn_end(tokenizer)
    for source in (tokenizer, generation, model.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or ())
    if not found:
        raise ValueError(
            "neither the tokenizer, nor the generation config, nor the model config defines an end-of-sequence token; "
            "set eos_token in tokenizer_config.json"
        )
    return sorted(found)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token that closes an answer in the chat template, or nothing. A base model may have a template but
    name another token as its end of sequence, and would sample on into the next turn."""
    answer = "Such is the answer."
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # no template, or one that raises; whoever prompts with it gets the error from grpo.tasks.prompts
        return set()
    _, found, after = text.rpartition(answer)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return special_tokens(tokenizer).keys() & {*ids[:1]}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that decoded text never contains, by id: those with a role (bos_token), and added special ones."""
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    with suppress(NotImplementedError):  # from mistral-common's tokenizer
        found |= {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return found


class Ending:
    """Decides where sampled ids end and what they say. Text never contains special tokens: no stop string may."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: list[int], stop: tuple[str, ...]):
        if isinstance(stop, str) or "" in stop:
            raise ValueError(f"stop={stop!r} must be a tuple of non-empty strings")
        unseen = special_tokens(tokenizer).values()
        special = [text for text in stop if any(token in text for token in unseen)]
        if special:
            raise ValueError(
                f"stop strings {special} contain a special token; decoded text never contains those, so it would "
                "never match: add the token to eos_token_id in generation_config.json instead"
            )
        self.eos, self.stop = frozenset(eos), stop
        self.may_complete = cache(self._may_complete)
        backend = getattr(tokenizer, "backend_tokenizer", None)  # on all cores, without checking each id first
        alone = partial(tokenizer.batch_decode, clean_up_tokenization_spaces=False)
        self._decode = backend.decode_batch if backend else alone

    def _may_complete(self, token: int) -> bool:
        """Whether a stop string may end in this token: its text has the last character of one, or part of a character.

        If that last character is a space, any token may: some tokenizers show a space only between tokens.
        """
        text = self.texts([[token]])[0]
        return any(stop[-1] in text or stop[-1].isspace() for stop in self.stop) or "\N{REPLACEMENT CHARACTER}" in text

    def texts(self, sequences: list[list[int]]) -> list[str]:
        """Ids -> text, without special tokens and without the end-of-sequence token, special or not."""
        bodies = [ids[:-1] if ids and ids[-1] in self.eos else ids for ids in sequences]
        return self._decode(bodies, skip_special_tokens=True) if bodies else []  # batch_decode([]) is "", not []

    def stop_at(self, text: str) -> int | None:
        """Where the first stop string in `text` begins, or None."""
        return min((at for at in map(text.find, self.stop) if at >= 0), default=None)

    def finish(self, ids: list[int], text: str) -> tuple[list[int], str, str]:
        """Sampled ids and their text -> ids kept, text kept, finish reason.

        A stop string may cross token borders, so it is looked for in the text. The last id kept is the first that
        completes it, and may hold text beyond it; the text kept ends before the stop string.
        """
        if not self.stops(text):
            return ids, text, "eos" if ids[-1] in self.eos else "length"
        counts = [n for n, token in enumerate(ids, 1) if n == len(ids) or self.may_complete(token)]
        text_of = cache(lambda n: self.texts([ids[:n]])[0])
        kept = counts[bisect_left(counts[:-1], True, key=lambda n: self.stops(text_of(n)))]
        return ids[:kept], text_of(kept)[: self.stop_at(text_of(kept))], "stop"

    def stops(self, text: str) -> bool:
        """Whether the text holds a stop string."""
        return any(stop in text for stop in self.stop)
