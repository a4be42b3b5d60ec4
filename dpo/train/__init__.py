"""From losses to a trained adapter."""
