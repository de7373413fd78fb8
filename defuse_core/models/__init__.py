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
from defuse_core.models.weights import (
    load_classifier,
    load_vae,
    read_weights,
    set_weights,
    weights_of,
)

__all__ = [
    "LeNet",
    "ReferenceCnn",
    "ResNet18",
    "Vae",
    "accuracy",
    "build_classifier",
    "build_vae",
    "decode_codes",
    "encode_images",
    "import_classifier",
    "load_classifier",
    "load_vae",
    "map_batches",
    "predict",
    "predict_probabilities",
    "read_weights",
    "set_weights",
    "to_device",
    "to_tensor",
    "weights_of",
]
