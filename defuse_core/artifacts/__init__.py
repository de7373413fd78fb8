"""The artefacts: what one step stores and another one reads.

Axis letters, used in every shape comment of the project:

    N images   C classes   H, W height and width   Z latent dimensions   Q draws per image
    F failures (codes in Psi)   K mixture components   S components kept (candidate scenarios)
    R review images per scenario   A accepted scenarios   G shards of the training set   V votes
    W reference models (or judges)   D components dropped before review
    M training images that codes are anchored at   L failures kept of each component
"""

from defuse_core.artifacts.arrays import (
    F32,
    F64,
    I64,
    NO_SCENARIO,
    NONE_OF_THE_ABOVE,
    U8,
    Bool,
    Weights,
)
from defuse_core.artifacts.correction import Corrections, Evaluation, FailedTrial, Sweep, SweepRow, Trial
from defuse_core.artifacts.failures import (
    Anchors,
    ComponentFailures,
    DroppedComponent,
    Failures,
    Psi,
    Scenarios,
    Shard,
)
from defuse_core.artifacts.review import Gallery, MoreImages, Override, Verdicts, Votes
from defuse_core.artifacts.training import (
    Checkpoint,
    ClassifierEpoch,
    Health,
    MeasuredPrecision,
    Models,
    ReferenceSet,
    VaeEpoch,
)
