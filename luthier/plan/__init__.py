"""What a run will need, said before it is paid for: memory, tokens, steps, hours, cost; from shapes alone."""
