"""A run file suggested for a folder of images, a classifier and a time: what `defuse init` writes."""

from defuse_core.suggest.image_size import VALIDATION_SHARE
from defuse_core.suggest.inspect import DataFacts, inspect_data
from defuse_core.suggest.plan import Plan, plan_run
from defuse_core.suggest.write import write_run_file
