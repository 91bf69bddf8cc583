"""Drawing answers from a policy, and reading log-probabilities and values at their positions."""
