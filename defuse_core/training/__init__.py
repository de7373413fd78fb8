"""Training: minibatches, several workers, checkpoints, precision, and the models that are trained."""
