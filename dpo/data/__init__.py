"""From files of preference pairs to micro-batches of tokens."""
