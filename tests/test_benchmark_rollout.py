"""`python -m benchmarks.rollout` measures the Sampler as it is: a tokenizer without words is enough for it."""

import torch

from benchmarks import rollout


def test_the_tiny_workload_is_measured():
    how = {"cuda_graph": True, "compile": False}
    found = rollout.measure(rollout.WORKLOADS["tiny"], torch.device("cpu"), 1, how, is_alone=True)
    assert found["tokens_per_second"] > 0
