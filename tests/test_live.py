"""The live view: what a terminal shows at each moment, found by playing back what was written to it."""

import io
import re
import sys
import time

import pytest

from grpo import live, metrics
from grpo.live import Progress, sparkline
from grpo.metrics import PhaseTimer, RunLogger


def screen(written: str) -> list[str]:
    """The lines of a terminal that understands `n lines up`, `erase the rest of the line` and `erase below` alone."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\n|\x1b\[\d+F|\x1b\[J|\x1b\[K)", written):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d+)F", part):
            assert column == 0 and int(up[1]) <= row, "goes back over whole lines only"
            row -= int(up[1])
        elif part in ("\x1b[J", "\x1b[K"):
            lines[row] = lines[row][:column]
            lines = lines[: row + 1] if part == "\x1b[J" else lines
        else:
            lines[row] = lines[row][:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return lines[:-1]


def test_what_a_stream_cannot_encode_is_printed_in_escapes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    live.print_any_text()
    print("5 \u2013 ë", flush=True)
    assert stream.buffer.getvalue() == b"5 \\u2013 \\xeb\n"


def test_without_a_standard_output_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    live.print_any_text()
    assert not live.can_show()
    Progress(live.can_show()).begin("rollout")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def test_a_phase_shows_its_bar_and_leaves_the_screen_clean(clock, capsys):
    timer = PhaseTimer(Progress(is_shown=True))
    with timer("rollout"):
        begun = capsys.readouterr().out
        clock[0] += 3
        timer.progress(3, 4, "a note")
        drawn = capsys.readouterr().out
    assert screen(begun) == ["rollout"]
    (line,) = screen(begun + drawn)
    assert line.split() == ["rollout", "━" * 22 + "─" * 8, "75%", "3/4,", "0:00:01", "left", "a", "note"]
    assert screen(begun + drawn + capsys.readouterr().out) == []


def test_a_second_count_within_a_phase_has_its_own_pace(clock, capsys):
    """The base model: 800 steps on worked solutions, then 40 of the habit, for which 30 minutes were foretold."""
    progress = Progress(is_shown=True)
    progress.begin("base")
    for done in range(1, 801):
        clock[0] += 0.5
        progress(done, 800)
    for done in range(1, 6):
        clock[0] += 0.5
        progress(done, 40)
    drawn = capsys.readouterr().out
    assert screen(drawn)[0].endswith(" 12%  5/40, 0:00:18 left")
    for done in range(1, 6):  # and another of as many
        clock[0] += 2
        progress(done, 40)
    drawn += capsys.readouterr().out
    assert screen(drawn)[0].endswith(" 12%  5/40, 0:01:10 left")
    for done in (50, 60):  # and one of more, of which the first word comes late
        clock[0] += 3
        progress(done, 100)
    assert screen(drawn + capsys.readouterr().out)[0].endswith(" 60%  60/100, 0:00:12 left")


def test_a_phase_that_counts_as_many_as_the_one_before_has_its_own_pace(clock, capsys):
    progress = Progress(is_shown=True)
    for done in (4, 2):
        progress.begin("rollout")
        clock[0] += done
        progress(done, 4)
    assert screen(capsys.readouterr().out)[0].endswith(" 50%  2/4, 0:00:02 left")


def test_the_time_left_is_told_by_the_last_twenty_steps(clock, capsys):
    progress = Progress(is_shown=True, num_steps=50)
    for step in range(1, 31):
        clock[0] += 2.0 if step > 10 else 100.0
        progress.step_done({"step": step})
    progress.begin("rollout")
    assert screen(capsys.readouterr().out)[1] == "step 30 of 50, 2.00 s a step, 0:00:40 left"


@pytest.mark.parametrize(
    ("encoding", "is_terminal", "kind", "expected"),
    [("utf-8", True, "xterm", True), ("ascii", True, "xterm", False)]
    + [("utf-8", False, "xterm", False), ("utf-8", True, "dumb", False)],
)
def test_the_view_is_for_terminals_that_can_move_and_print_bars(monkeypatch, encoding, is_terminal, kind, expected):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", "70")
    assert live.can_show() == expected and live.line_width() == (70 if expected else float("inf"))


def test_the_lines_below_say_where_the_run_stands(clock, capsys):
    progress = Progress(is_shown=True, num_steps=50)
    for step in (1, 2, 3):
        clock[0] += 2.0
        row = {"step": step, "reward": 0.1 * 2 ** (step - 1), "seconds/rollout": 1.5, "seconds/update": 0.25}
        progress.step_done(row | ({"validation/accuracy": 0.5} if step == 3 else {}))
    progress.begin("rollout")
    assert screen(capsys.readouterr().out) == [
        "rollout",
        "step 3 of 50, 2.00 s a step, 0:01:34 left",
        "▁▃█ reward 0.400   ▁ validation accuracy 50.0%",
        "seconds: rollout 1.50, update 0.25",
    ]


def test_the_rows_of_the_table_stay_above_what_is_rewritten(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "can_show", lambda: True)
    logger = RunLogger(tmp_path, is_writer=True, config={"num_steps": 2})
    with logger.timer("rollout"):
        logger.say("a word during a phase")
    logger.log({"step": 1, "reward": 0.5})
    with logger.timer("rollout"):
        pass
    logger.log({"step": 2, "reward": 0.5})
    logger.close()
    written = capsys.readouterr().out
    assert "step 1 of 2" in written, "below the bar of the second phase"
    said, heading, *rows = screen(written)
    assert said == "a word during a phase" and heading.split()[0] == "step"
    assert [row.split()[0] for row in rows] == ["1", "2"]


def test_it_is_drawn_at_most_ten_times_a_second(clock, capsys):
    progress = Progress(is_shown=True)
    progress.begin("update")
    for done in range(1000):
        clock[0] += 0.001
        progress(done, 1000)
    assert 9 <= capsys.readouterr().out.count("update") - 1 <= 10


def test_a_drawing_takes_less_than_a_hundredth_of_the_time_between_two(monkeypatch, tmp_path):
    progress = Progress(is_shown=True, num_steps=1000)
    with (tmp_path / "terminal").open("w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(live, "INTERVAL_S", 0.0)
        for step in range(1, 501):
            progress.step_done({"step": step, "reward": step % 7, "validation/accuracy": 0.5, "seconds/rollout": 1.0})
        seconds = []
        for done in range(50):
            start = time.perf_counter()
            progress(done, 50)
            seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[25] < 0.001, "0.1 s lie between two drawings"


def test_no_line_is_wider_than_the_terminal(capsys, monkeypatch, clock):
    monkeypatch.setenv("COLUMNS", "20")
    progress = Progress(is_shown=True)
    progress.begin("rollout")
    clock[0] += 1
    progress(1, 2, "a long note")
    assert [len(line) for line in screen(capsys.readouterr().out)] == [19]


def test_nothing_is_written_where_there_is_no_terminal(capsys):
    timer = PhaseTimer(Progress(is_shown=live.can_show(), num_steps=3))
    with timer("rollout"):
        timer.progress(1, 4)
    timer.progress.step_done({"step": 1, "reward": 1.0})
    assert capsys.readouterr() == ("", "")


def test_a_sparkline_goes_from_the_lowest_mean_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert sparkline([0, 8, 6, 2, 1], width=3) == "▁█▃", "means 0, 7 and 1.5"
    assert [len(sparkline(range(count))) for count in (30, 31, 59, 1000)] == [30] * 4, "its width stays"


def test_a_view_is_never_blank_while_it_is_redrawn(clock, capsys):
    progress = Progress(is_shown=True, num_steps=9)
    progress.step_done({"step": 1, "reward": 0.5, "seconds/rollout": 1.0})
    progress.begin("rollout")
    before = capsys.readouterr().out
    clock[0] += 1
    progress(1, 2)
    drawn = capsys.readouterr().out
    rewritten = [screen(before + drawn[: end.end()]) for end in re.finditer("\n", drawn)]
    assert [lines[1:] for lines in rewritten] == [["step 1 of 9", "▁ reward 0.500", "seconds: rollout 1.00"]] * 4
    assert rewritten[0][0].split() == ["rollout", "━" * 15 + "─" * 15, "50%", "1/2,", "0:00:01", "left"]


def test_numbers_come_before_drawings_on_a_narrow_terminal(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    progress = Progress(is_shown=True, num_steps=900)
    for step in range(100):
        progress.step_done({"step": step, "reward": 0.5, "validation/accuracy": step / 100})
    progress.begin("evaluation")
    clock[0] += 10
    progress(100, 1000, "worked")
    bar, _, curves, _ = screen(capsys.readouterr().out)
    assert bar.endswith("─  10%  100/1,000, 0:01:30 left  worked")
    assert "reward 0.500" in curves and curves.endswith(" validation accuracy 99.0%")


def test_lines_are_broken_between_words_and_where_they_are_too_wide_only():
    text = "kept:  as  it is\nthis goes over the edge"
    assert live.fold(text, 16) == "kept:  as  it is\nthis goes over\n    the edge"
    assert live.fold(text, float("inf")) == text
    assert live.fold("see a/long-path/of-a-file.py", 12) == "see\n    a/long-path/of-a-file.py", "to be copied"
