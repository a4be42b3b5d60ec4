"""The model, its log-probs, and the reference they are compared with."""
