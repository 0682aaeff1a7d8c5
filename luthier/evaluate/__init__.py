"""What a run is worth: loss on held-out data, samples, exact answers."""
