"""Models behind OpenAI's HTTP interface: many clients, one loop, every text batched with all others."""
