"""Serving the corrected classifier with Ray Serve: checks, versions, canaries and the scenario watch."""
