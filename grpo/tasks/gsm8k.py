"""Task `gsm8k`: grade-school word problems (arXiv:2110.14168), from the hub (openai/gsm8k) or local files.

The answer column is worked reasoning with calculator marks `<<48/2=24>>`, then a line `#### 24`. The marks are
removed, and a worked solution ends in the line that the rewards ask for.
"""

from __future__ import annotations

import re

from grpo.records import Problem
from grpo.rewards import FINAL_PREFIX, parse_number
from grpo.tasks.rows import RowTask

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def _exemplar(number: int, question: str, answer: str, *reasoning: str) -> Problem:
    solution = "\n".join([*reasoning, FINAL_PREFIX + answer])
    return Problem(id=f"builtin/{number}", question=question, answer=answer, solution=solution)


# Written for this project: short, and between them plain, money, comma, percent and negative answers.
EXEMPLARS = (
    _exemplar(
        0,
        "A bakery fills 6 trays with 14 rolls each and gives 9 rolls to a shelter. How many rolls are left to sell?",
        "75",
        "The trays hold 6 * 14 = 84 rolls.",
        "After the gift, 84 - 9 = 75 rolls are left.",
    ),
    _exemplar(
        1,
        "Ines buys 3 notebooks at $4 each and a pen for $2. She pays with a $20 note. How much change does she get?",
        "$6",
        "The notebooks cost 3 * 4 = $12.",
        "With the pen that is 12 + 2 = $14.",
        "Her change is 20 - 14 = $6.",
    ),
    _exemplar(
        2,
        "Tomas is twice as old as Pia, who is 3 years younger than Lena. Lena is 11. How old will Tomas be in 5 years?",
        "21",
        "Pia is 11 - 3 = 8 years old.",
        "Tomas is 2 * 8 = 16.",
        "In 5 years he will be 16 + 5 = 21.",
    ),
    _exemplar(
        3,
        "A tank holds 5,000 litres. A pump takes out 750 litres an hour for 4 hours. How many litres remain?",
        "2,000",
        "The pump takes out 750 * 4 = 3,000 litres.",
        "So 5,000 - 3,000 = 2,000 litres remain.",
    ),
    _exemplar(
        4,
        "Of 40 seedlings, snails ate 12 and 4 dried out. What percentage of the seedlings survived?",
        "60%",
        "In all 12 + 4 = 16 seedlings were lost.",
        "That leaves 40 - 16 = 24.",
        "The share is 24 / 40 = 0.6, or 60%.",
    ),
    _exemplar(
        5,
        "A printer prints 12 pages a minute. How many minutes does it need for 5 copies of a 36-page report?",
        "15",
        "There are 5 * 36 = 180 pages.",
        "The printer needs 180 / 12 = 15 minutes.",
    ),
    _exemplar(
        6,
        "At noon it is 5 degrees. For 4 hours it gets 3 degrees colder every hour. What is the temperature then?",
        "-7",
        "It gets 4 * 3 = 12 degrees colder.",
        "The temperature is 5 - 12 = -7 degrees.",
    ),
    _exemplar(
        7,
        "Omar cuts a quarter off an 80 m rope and uses half of the rest for a net. How many metres of rope are left?",
        "30",
        "A quarter is 80 / 4 = 20 m, so 80 - 20 = 60 m are left.",
        "After the net, 60 / 2 = 30 m are left.",
    ),
)


class Gsm8k(RowTask):
    """7,473 training and 1,319 test problems; 10 % of the training problems are held out for validation."""

    name = "gsm8k"
    question_column, answer_column = "question", "answer"
    hub = ("openai/gsm8k", "main")
    exemplars = EXEMPLARS

    def read_answer(self, text: str) -> tuple[str, str]:
        reasoning, mark, answer = (part.strip() for part in text.rpartition("####"))
        if not mark or parse_number(answer) is None:
            raise ValueError(f"the answer does not end in '#### <number>': {text[-60:]!r}")
        return answer, "\n".join([_CALCULATOR_MARK.sub("", reasoning), FINAL_PREFIX + answer])
