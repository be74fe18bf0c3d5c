"""`python -m benchmarks.rollout` measures the Sampler as it is: a tokenizer without words is enough for it."""

import sys

import pytest
import torch

from benchmarks import rollout


@pytest.mark.skipif(sys.platform != "linux", reason="benchmarks read what a process takes from Linux's /proc")
def test_the_tiny_workload_is_measured():
    how = {"cuda_graph": True, "compile": False}
    found = rollout.measure(rollout.WORKLOADS["tiny"], torch.device("cpu"), 1, how, is_alone=True)
    assert found["tokens_per_second"] > 0
