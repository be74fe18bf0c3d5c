"""Inside the sandbox: takes a program, then calls its functions as asked. Its source is passed to a fresh interpreter.

Lines of JSON over a pipe: out {"hello"}; in the program; out {} or {"raised": name}; then in
{"function", "arguments", "keywords"} and out {"value"} or {"raised"}, until the pipe closes. The program shares this
process, so it can answer what it likes; but it never sees an expected value, and every answer is compared outside,
in grpo.rewards.sandbox.judge, which uses `encode` and `decode` of this file too.
"""

import json
import os
import sys

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
    raise TypeError(f"{type(value).__name__} is not plain data")


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
    write(file, json.dumps(message))


def write(file, line):
    file.write(line.encode() + b"\n")
    file.flush()


def receive(file, limit=-1):
    """The next message; EOFError if the pipe has closed or it exceeds `limit` bytes, ValueError if it is not JSON."""
    line = file.readline(limit)
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def attempt(file, action):
    """Send the result of an action, or the name of what it raised: anything, SystemExit included."""
    try:
        line = json.dumps(action())
    except BaseException as error:
        line = json.dumps({"raised": type(error).__name__})
    write(file, line)


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

    def answer():
        arguments, keywords = decode(call["arguments"]), decode(call["keywords"])
        return {"value": encode(names[call["function"]](*arguments, **keywords))}

    attempt(answers, load)
    while True:
        try:
            call = receive(calls)
        except EOFError:
            os._exit(0)  # not sys.exit: the program's threads and exit handlers could keep it alive
        attempt(answers, answer)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    serve()
