"""The failure probability of new inputs, and the scenario that explains it."""
