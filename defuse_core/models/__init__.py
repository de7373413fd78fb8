"""The models of a run: architectures, weights, and inference in batches."""

from defuse_core.models.adapters import EXTERNAL, classifier_failure, expect_full_precision
from defuse_core.models.architectures import (
    ReferenceCnn,
    ResidualNet,
    ResNet18,
    build_classifier,
    expect_own_weights,
    import_module,
)
from defuse_core.models.checks import check_outputs, expect_trainable
from defuse_core.models.decoding import Decoder, Decodings, StoredVae, decode_codes, decoder_at, images_of
from defuse_core.models.inference import (
    accuracy,
    answers_from,
    encode_images,
    expect_rows,
    is_as_finite,
    load_classifier,
    load_for_inference,
    load_pretrained,
    load_vae,
    logits_of,
    map_batches,
    map_images,
    predict,
    predict_logits,
    predict_probabilities,
    read_weights,
    set_weights,
    weights_of,
)
from defuse_core.models.layout import to_device, to_tensor, use_default_layout_if_needed
from defuse_core.models.probe import is_same_program, log_classifier, probe_classifier
from defuse_core.models.programs import (
    SelfContainedClassifier,
    copy_for_inference,
    expect_storable,
    load_program,
    program_of,
)
from defuse_core.models.vae import Vae, build_vae, expect_autoencoder, kl_to_prior
