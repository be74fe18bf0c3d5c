"""Where the model's code runs: in a process (guest) behind walls (box, launcher), with a judge outside, out of reach.

The walls are namespaces, resource limits and a filter of system calls. `find_sandbox` gives a Sandbox that has
withstood its self-test, or says why there is none; `judge_program` runs a program against tests in it. Linux only.
"""

from grpo.rewards.sandbox.box import Sandbox, SandboxError
from grpo.rewards.sandbox.judge import Verdict, find_sandbox, judge_program

__all__ = ["Sandbox", "SandboxError", "Verdict", "find_sandbox", "judge_program"]
