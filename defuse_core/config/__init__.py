"""The run file: YAML, validated into frozen models, one section per step."""

from defuse_core.config.base import PrintableText, Section
from defuse_core.config.loading import (
    added_lambdas,
    apply_override,
    changed_field,
    dump_run_file,
    expect_fields,
    first_problem,
    flat_fields,
    load_run_file,
    parse_run_file,
    parse_yaml,
)
from defuse_core.config.run_file import (
    Arithmetic,
    CheckSection,
    PrecisionSection,
    ResourcesSection,
    RunFile,
    ServeSection,
    model_sections,
    with_absolute_root,
    with_weights,
)
from defuse_core.config.sections import (
    WITHOUT_ROOT,
    ClassifierSection,
    ClassifierSet,
    CorrectSection,
    DataSection,
    DistillSection,
    IdentifySection,
    ReviewSection,
    VaeSection,
)
