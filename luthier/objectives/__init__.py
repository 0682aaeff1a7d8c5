"""Training objectives: functions over the log-probs of labelled tokens."""
