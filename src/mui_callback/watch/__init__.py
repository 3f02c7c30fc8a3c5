"""A run in the terminal, from its record, while it trains."""
