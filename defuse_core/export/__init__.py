"""A run's results in formats of other tools: the corrected classifier, and the pictures of the failure scenarios."""

from defuse_core.export.models import ExportedModel, corrected_classifier, export_model, plain_weights
from defuse_core.export.pictures import export_scenarios

__all__ = ["ExportedModel", "corrected_classifier", "export_model", "export_scenarios", "plain_weights"]
