"""Two sides compared by a judge: a model behind an endpoint, a local one, or a person."""
