"""Inside the sandbox: takes a program, then calls its functions as asked. Its source is passed to a fresh interpreter.

Frames over a pipe, each a length and JSON: out {"hello"}; in the program; out {} or {"raised": name}; then in
{"function", "arguments", "keywords"} and out {"value"} or {"raised"}, until the pipe closes. The program shares this
process, so it can answer what it likes; but it never sees an expected value, and every answer is compared outside,
in grpo.rewards.sandbox.judge, which uses `encode` and `decode` of this file too.
"""

import json
import os
import struct
import sys
from functools import partial

HEADER = struct.Struct(">I")
TAGGED = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value):
    """Plain data as what JSON can hold; TypeError for anything else."""
    if value is None or isinstance(value, (bool, str)):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for name, kind in TAGGED.items():
        if isinstance(value, kind):
            return {name: [encode(item) for item in value]}
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(value):
    """What `encode` was given; ValueError or TypeError for what it never writes."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name == "dict":
        return {decode(key): decode(item) for key, item in content}
    if name == "bytes":
        return content.encode("latin-1")
    if name == "complex":
        return complex(*content)
    if name in TAGGED:
        return TAGGED[name](decode(item) for item in content)
    raise ValueError(f"unknown tag {name!r:.40}")


def send(file, message):
    write(file, json.dumps(message).encode())


def write(file, data):
    file.write(HEADER.pack(len(data)) + data)
    file.flush()


def receive(file, limit=1 << 30):
    """The next message; EOFError where the pipe has closed, ValueError where it is too long or no JSON."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    (size,) = HEADER.unpack(header)
    if size > limit:
        raise ValueError(f"a message of {size} bytes, more than {limit}")
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return json.loads(data)


def attempt(action):
    """The answer of an action as JSON, or the name of what it raised: anything, SystemExit included."""
    try:
        return json.dumps(action()).encode()
    except BaseException as error:
        return json.dumps({"raised": type(error).__name__}).encode()


def answer(names, call):
    arguments, keywords = decode(call["arguments"]), decode(call["keywords"])
    return {"value": encode(names[call["function"]](*arguments, **keywords))}


def serve():
    """Run the program that the judge sends, then answer its calls until it hangs up."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):  # what the program prints goes nowhere, however much it is
        os.dup2(null, descriptor)
    send(answers, {"hello": 1})
    source, names = receive(calls), {"__name__": "solution"}

    def load():
        exec(compile(source, "solution.py", "exec"), names)
        return {}

    write(answers, attempt(load))
    while True:
        try:
            call = receive(calls)
        except EOFError:
            os._exit(0)  # not sys.exit: threads and exit handlers of the program would keep it
        write(answers, attempt(partial(answer, names, call)))


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    serve()
