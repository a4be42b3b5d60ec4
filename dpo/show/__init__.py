"""Looking at what the training did: samples, evaluation."""
