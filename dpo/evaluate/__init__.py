"""What is looked at during training: held-out pairs, samples, token rewards, warnings."""
