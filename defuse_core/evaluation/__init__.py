"""What a run is worth: accuracies, evidence by independent judges, descriptions, the health of the β-VAE."""
