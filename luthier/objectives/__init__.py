"""Training objectives: what is made of the log-probs of labelled tokens, and minimised."""
