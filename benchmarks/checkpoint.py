"""How long a checkpoint blocks training: python -m benchmarks.checkpoint

A random Qwen2 with its Adam state is saved again and again. `waiting` is blocked until the checkpoint is on disk
(written, hashed, flushed, renamed), `in background` only while the state is copied to memory. How much the writing
thread slows training down is the difference between `steps` and `steps beside`, the same number of steps alone and
beside the writing. Medians over alternating rounds; the last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from benchmarks.common import default_device, make_parser, measured_on
from grpo import checkpoint
from grpo.config import OptimConfig
from grpo.policy import Policy, choose_precision
from grpo.update import make_optimizer
from kernels.measure import seconds


class Trainee:
    """A policy that can take a step and be saved as train.py does it."""

    def __init__(self, width: int, device: torch.device):
        torch.manual_seed(0)
        heads = {"num_attention_heads": max(2, width // 64), "num_key_value_heads": 2}
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6, "vocab_size": 16384}
        words = Tokenizer(models.WordLevel({"<eos>": 0}))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
        masters = Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).to(device)
        self.policy = Policy(masters, tokenizer, choose_precision("auto", device))
        self.optimizer = make_optimizer(list(masters.parameters()), OptimConfig(lr=1e-6))
        self.tokens = torch.randint(16384, (1, 64), device=device)

    def step(self) -> None:
        self.policy.masters(input_ids=self.tokens).logits.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, writer: checkpoint.Writer, number: int) -> None:
        state = {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}
        writer.save(number, lambda folder, state: self.policy.save(folder, state["policy"]), state, best=None)


def measure(trainee: Trainee, folder: Path, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Raw seconds by name. Enough steps follow a save for its writing to end during them."""
    writer = checkpoint.Writer(folder, keep_last=1)
    time = partial(seconds, device)
    trainee.step()
    a_save = time(lambda: (trainee.save(writer, 0), writer.wait()))
    count = 1 + int(1.5 * a_save / time(trainee.step))
    steps = lambda: [trainee.step() for _ in range(count)]
    found: dict[str, list[float]] = {name: [] for name in ("waiting", "in background", "steps", "steps beside", "rest")}
    for number in range(1, 2 * rounds, 2):
        found["waiting"].append(time(lambda n=number: (trainee.save(writer, n), writer.wait())))
        found["steps"].append(time(steps))
        found["in background"].append(time(lambda n=number: trainee.save(writer, n + 1)))
        found["steps beside"].append(time(steps))
        found["rest"].append(time(writer.wait))  # what the next save would have waited for
    return found


def report(found: dict[str, list[float]], num_bytes: int, facts: dict) -> None:
    """The table, then the JSON line."""
    median = {name: statistics.median(values) for name, values in found.items()}
    print(f"{facts['parameters'] / 1e6:.1f} M parameters, {num_bytes / 2**20:.0f} MiB a checkpoint, {facts['device']}")
    print(f"{'':<16}{'median s':>10}{'fastest':>10}{'slowest':>10}")
    for name, values in found.items():
        print(f"{name:<16}{median[name]:>10.3f}{min(values):>10.3f}{max(values):>10.3f}")
    shorter = median["waiting"] / median["in background"]
    print(f"a save in the background blocks training for a {shorter:.1f} times shorter time")
    print(json.dumps({"median_seconds": median, "bytes": num_bytes, **facts, "seconds": found}))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=512, help="of the model: 512 is 40 M parameters")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds, for medians")
    parser.add_argument(
        "--folder", help="where to write; by default the temporary folder, which may not be a real disk"
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    device = default_device()
    trainee = Trainee(arguments.width, device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(trainee, Path(folder), arguments.rounds, device)
        files = checkpoint.latest(folder).rglob("*")
        num_bytes = sum(path.stat().st_size for path in files if path.is_file())
    parameters = sum(parameter.numel() for parameter in trainee.policy.masters.parameters())
    report(found, num_bytes, {"parameters": parameters} | measured_on(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
