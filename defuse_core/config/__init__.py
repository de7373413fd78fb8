"""The run file: YAML that is checked into frozen models, one section per step."""

from defuse_core.config.base import Section
from defuse_core.config.files import (
    apply_override,
    drift,
    dump_run_file,
    first_problem,
    load_run_file,
    parse_run_file,
)
from defuse_core.config.sections import (
    PAPER_LAMBDAS,
    STEPS,
    ClassifierSection,
    CorrectSection,
    DataSection,
    DistillSection,
    IdentifySection,
    ReferenceModels,
    ReportSection,
    ResourcesSection,
    ReviewSection,
    RunFile,
    VaeSection,
)
from defuse_core.config.serving import CheckSection, ServeSection

__all__ = [
    "PAPER_LAMBDAS",
    "STEPS",
    "CheckSection",
    "ClassifierSection",
    "CorrectSection",
    "DataSection",
    "DistillSection",
    "IdentifySection",
    "ReferenceModels",
    "ReportSection",
    "ResourcesSection",
    "ReviewSection",
    "RunFile",
    "Section",
    "ServeSection",
    "VaeSection",
    "apply_override",
    "drift",
    "dump_run_file",
    "first_problem",
    "load_run_file",
    "parse_run_file",
]
