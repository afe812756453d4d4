"""From rows of a dataset to tokens, and from tokens to log-probabilities of answers: for training and for sweeps."""
