"""logits, one uniform per row -> token and its log-prob under the distribution that it was drawn from."""
