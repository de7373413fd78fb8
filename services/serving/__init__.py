"""Serving the corrected classifier: checks, versions, the Ray Serve application and the scenario watch."""
