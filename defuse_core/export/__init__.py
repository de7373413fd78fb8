"""A run's results in formats of other tools: the corrected classifier, and the pictures of the failure scenarios."""

from defuse_core.export.models import corrected_classifier, export_model, plain_weights
from defuse_core.export.pictures import export_scenarios
