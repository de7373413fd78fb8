"""Defuse: find, show and fix the regions where an image classifier is wrong. `pipeline.py` tells the story."""
