"""Rewards: pure verifiers (text in, score out) and the runner that gives every value a status."""

from grpo.rewards.runner import Outcome, Reward, Scorer, refuse_uncallable, refuse_unscored, score_groups, score_texts
from grpo.rewards.verifiers import FINAL_PREFIX, correctness_reward, final_answer, format_reward, parse_number

__all__ = [
    "FINAL_PREFIX",
    "Outcome",
    "Reward",
    "Scorer",
    "correctness_reward",
    "final_answer",
    "format_reward",
    "parse_number",
    "refuse_uncallable",
    "refuse_unscored",
    "score_groups",
    "score_texts",
]
