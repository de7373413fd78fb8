"""The run file: YAML, validated into frozen models, one section per step."""

from defuse_core.config.loading import (
    apply_override,
    changed_field,
    dump_run_file,
    first_problem,
    load_run_file,
    parse_run_file,
)
from defuse_core.config.run_file import STEPS, CheckSection, ResourcesSection, RunFile, ServeSection
from defuse_core.config.sections import (
    PAPER_LAMBDAS,
    ClassifierSection,
    ClassifierSet,
    CorrectSection,
    DataSection,
    DistillSection,
    IdentifySection,
    JudgesSection,
    ReferenceModels,
    ReportSection,
    ReviewSection,
    Section,
    VaeSection,
)

__all__ = [
    "PAPER_LAMBDAS",
    "STEPS",
    "CheckSection",
    "ClassifierSection",
    "ClassifierSet",
    "CorrectSection",
    "DataSection",
    "DistillSection",
    "IdentifySection",
    "JudgesSection",
    "ReferenceModels",
    "ReportSection",
    "ResourcesSection",
    "ReviewSection",
    "RunFile",
    "Section",
    "ServeSection",
    "VaeSection",
    "apply_override",
    "changed_field",
    "dump_run_file",
    "first_problem",
    "load_run_file",
    "parse_run_file",
]
