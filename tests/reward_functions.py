"""Reward functions, good and bad, for tests of the worker processes. No import of torch: workers load this file."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
import threading
import time


def share_of_w7(completions, **columns):
    return [words.count("w7") / max(1, len(words)) for words in (text.split() for text in completions)]


def length_of(completions, **columns):
    return [float(len(text)) for text in completions]


async def length_later(completions, *, answer, **columns):
    await asyncio.sleep(0.01)
    return [float(len(text)) + float(a) for text, a in zip(completions, answer, strict=True)]


def nap(completions, *, seconds, **columns):
    time.sleep(seconds)
    return [0.0] * len(completions)


def process_id(completions, **columns):
    return [float(os.getpid())] * len(completions)


def has_torch(completions, **columns):
    return [float("torch" in sys.modules)] * len(completions)


def spoilt(completions, **columns):
    """Whether this process was given several completions before: a call at which it fails."""
    spoilt.is_so = getattr(spoilt, "is_so", False) or len(completions) > 1
    if len(completions) > 1:
        raise RuntimeError("several")
    return [float(spoilt.is_so)]


def in_words(completions, **columns):
    """What a completion says is what happens: raise, hang, die, miscount, exit, abstain, ...; else its length."""
    values = []
    for text in completions:
        if text == "raise":
            raise RuntimeError("asked to") from ValueError("longer than what is kept of a traceback " * 99)
        if text == "hang":
            time.sleep(1000)
        if text == "stubborn":  # ignores what can be ignored, and leaves a child behind
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            subprocess.Popen(["sleep", columns["nap"][0]])
            while True:
                pass
        if text == "die":
            os._exit(3)
        if text == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "exit":
            sys.exit(0)
        values.append({"abstain": None, "infinite": float("inf"), "text": "no"}.get(text, float(len(text))))
    return values + [1.0] if "miscount" in completions else values


def forks(completions, **columns):
    """Its child comes back, too: an exception there reaches the worker's loop."""
    if os.fork() == 0:
        raise RuntimeError("in the child")
    os.wait()
    return [0.0] * len(completions)


def stops_afterwards(completions, **columns):
    """Stops its process a little after the call."""
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    return [0.0] * len(completions)


def stops_midway(completions, **columns):
    """Stops its process when a part of an answer is in the pipe."""
    os.write(int(sys.argv[1]), struct.pack("!i", 100) + b"{")
    os.kill(os.getpid(), signal.SIGSTOP)


def faulty_on_some(completions, **columns):
    """Raises, hangs, miscounts or dies on some completions that open with one of four words; pays the others 0."""
    opened = {text.split(" ")[0] for text in completions if sum(map(ord, text)) % 5 == 0}
    if "w11" in opened:
        raise RuntimeError("w11")
    if "w12" in opened:
        time.sleep(1000)
    if "w13" in opened:
        os._exit(1)
    return [0.0] * (len(completions) + ("w14" in opened))
