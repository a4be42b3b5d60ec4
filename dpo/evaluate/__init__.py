"""Evaluation during training: held-out pairs, samples, token rewards, warnings."""
