"""What follows a finished run: merge, generate, evaluate, card, push."""
