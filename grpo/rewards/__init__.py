"""Rewards: pure verifiers (text in, score out) and the runner that gives every value a status."""

from grpo.rewards.runner import Outcome, Reward, score_groups, score_texts
from grpo.rewards.verifiers import FINAL_PREFIX, correctness_reward, final_answer, format_reward, parse_number

__all__ = [
    "FINAL_PREFIX",
    "Outcome",
    "Reward",
    "correctness_reward",
    "final_answer",
    "format_reward",
    "parse_number",
    "score_groups",
    "score_texts",
]
