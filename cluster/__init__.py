"""Where the steps run: placement on Ray, and nothing else."""
