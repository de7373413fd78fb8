"""The models of a run: architectures, weights, and inference in batches."""

from defuse_core.models.architectures import (
    LeNet,
    ReferenceCnn,
    ResNet18,
    Vae,
    build_classifier,
    build_vae,
    import_classifier,
)
from defuse_core.models.inference import (
    accuracy,
    decode_codes,
    encode_images,
    map_batches,
    predict,
    predict_probabilities,
    to_device,
    to_tensor,
)
from defuse_core.models.probe import check_outputs, log_classifier, probe_classifier
from defuse_core.models.programs import SelfContainedClassifier
from defuse_core.models.state_dicts import read_weights
from defuse_core.models.weights import (
    load_classifier,
    load_pretrained,
    load_vae,
    set_weights,
    weights_of,
)

__all__ = [
    "LeNet",
    "ReferenceCnn",
    "ResNet18",
    "SelfContainedClassifier",
    "Vae",
    "accuracy",
    "build_classifier",
    "build_vae",
    "check_outputs",
    "decode_codes",
    "encode_images",
    "import_classifier",
    "load_classifier",
    "load_pretrained",
    "load_vae",
    "log_classifier",
    "map_batches",
    "predict",
    "predict_probabilities",
    "probe_classifier",
    "read_weights",
    "set_weights",
    "to_device",
    "to_tensor",
    "weights_of",
]
