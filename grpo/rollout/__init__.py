"""Problems -> groups of completions, sampled with the policy's own weights."""

from grpo.rollout.engine import Sampler
from grpo.rollout.philox import EVALUATION, TRAINING

__all__ = ["EVALUATION", "TRAINING", "Sampler"]
