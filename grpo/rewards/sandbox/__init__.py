"""Where code of the model runs: walls (launcher), a process behind them (guest), a judge outside that it cannot reach.

`find_sandbox` gives a Sandbox that has withstood its self-test, or says why there is none; `judge_program` runs a
program against tests in it. Linux only.
"""

from grpo.rewards.sandbox.box import Sandbox, SandboxError
from grpo.rewards.sandbox.judge import Verdict, find_sandbox, judge_program

__all__ = ["Sandbox", "SandboxError", "Verdict", "find_sandbox", "judge_program"]
