"""hidden states and head weights -> log-prob and entropy of each target token, with no [T, V] tensor."""
