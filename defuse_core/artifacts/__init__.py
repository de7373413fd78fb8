"""The artefacts: what one step stores and another one reads.

Axis letters, used in every shape comment of the project:

    N images   C classes   H, W height and width   Z latent dimensions   Q draws per image
    F failures (codes in Psi)   K mixture components   S components kept (candidate scenarios)
    R review images per scenario   A accepted scenarios   G shards of the training set   V votes
    W reference models (or judges)   D components dropped before review
    M training images that codes are anchored at   L failures kept of each component
"""

from defuse_core.artifacts.scenarios import (
    F32,
    F64,
    I64,
    NO_SCENARIO,
    NONE_OF_THE_ABOVE,
    U8,
    Anchors,
    Bool,
    ComponentFailures,
    DroppedComponent,
    Failures,
    Gallery,
    MoreImages,
    Override,
    Psi,
    Scenarios,
    Shard,
    Verdicts,
    Votes,
    Weights,
)
from defuse_core.artifacts.training import (
    Checkpoint,
    ClassifierEpoch,
    Corrections,
    Evaluation,
    FailedTrial,
    Health,
    MeasuredPrecision,
    Models,
    ReferenceSet,
    Sweep,
    SweepRow,
    Trial,
    VaeEpoch,
)
