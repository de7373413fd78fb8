import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from defuse_core.config import RunFile, load_run_file
from defuse_core.errors import ModelError
from defuse_core.models import (
    Decoder,
    ReferenceCnn,
    accuracy,
    answers_from,
    build_classifier,
    build_vae,
    decode_codes,
    encode_images,
    expect_autoencoder,
    load_classifier,
    load_vae,
    predict,
    predict_probabilities,
    read_weights,
    set_weights,
    to_device,
    weights_of,
)
from defuse_core.training.precision import answers_as_in_f32
from tests.conftest import ROOT, tiny
from tests.own_classifiers import Standardising

RUNS = ROOT / "deploy" / "runs"


def paper(name: str) -> RunFile:
    return load_run_file(RUNS / f"{name}.yaml")


def layers(module: nn.Module) -> list[tuple[int, ...]]:
    """(in, out, kernel, stride) of convolutions and (in, out) of dense layers, in order."""
    found: list[tuple[int, ...]] = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            found.append((part.in_channels, part.out_channels, part.kernel_size[0], part.stride[0]))
        elif isinstance(part, nn.Linear):
            found.append((part.in_features, part.out_features))
    return found


def test_the_mnist_classifier_is_figure_7():
    convolutions = [(1, 64, 4, 2)] + [(64, 64, 4, 2)] * 3
    assert layers(build_classifier(paper("mnist"), 10)) == [*convolutions, (256, 256), (256, 256), (256, 10)]


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [  # Figures 8 and 9, 12 and 13, 10 and 11
        ("mnist", [(1, 32, 4, 2)] + [(32, 32, 4, 2)] * 2 + [(512, 256), (256, 256), (256, 20)],
         [(10, 256), (256, 256), (256, 256), (64, 32, 4, 2)] + [(32, 32, 4, 2)] * 2 + [(32, 1, 4, 2)]),
        ("svhn", [(3, 64, 4, 2)] + [(64, 64, 4, 2)] * 2 + [(1024, 256), (256, 256), (256, 20)],
         [(10, 256), (256, 256), (256, 256)] + [(64, 64, 4, 2)] * 3 + [(64, 3, 4, 2)]),
        ("signs", [(3, 64, 4, 2)] + [(64, 64, 4, 2)] * 3 + [(4096, 256), (256, 256), (256, 30)],
         [(15, 256), (256, 256), (256, 256), (16, 64, 4, 2)] + [(64, 64, 4, 2)] * 3 + [(64, 3, 4, 2)]),
    ],
)  # fmt: skip
def test_the_vaes_are_the_papers(name, encoder, decoder):
    vae = build_vae(paper(name))
    assert layers(vae.encoder) == encoder
    assert layers(vae.decoder) == decoder


def test_the_convolutional_vae_mirrors_its_encoder_with_channels_doubled_at_each_stage():
    vae = build_vae(tiny(vae={"architecture": "convolutional", "encoder_stages": 3}, data={"image_size": 32}))
    down = [(1, 8, 4, 2), (8, 16, 4, 2), (16, 32, 4, 2)]
    assert layers(vae.encoder) == [*down, (512, 64), (64, 8)]
    assert layers(vae.decoder) == [(4, 64), (64, 512), (32, 16, 4, 2), (16, 8, 4, 2), (8, 1, 4, 2)]


@pytest.mark.parametrize("name", ["mnist", "mnist-laptop", "svhn", "signs", "signs-laptop", "digits"])
def test_every_shipped_models_shapes_fit_each_other(name):
    spec = paper(name)
    data = spec.data
    images = torch.rand(2, data.channels, data.image_size, data.image_size)
    plain = spec.with_fields("classifier", imagenet=False)
    assert build_classifier(plain, 43).eval()(images).shape == (2, 43)
    vae = build_vae(spec)
    mu, log_variance = vae.encode(images)
    assert mu.shape == log_variance.shape == (2, spec.vae.latent_dim)
    decoded = vae.decode(mu)
    assert decoded.shape == images.shape
    assert 0 <= float(decoded.detach().min()) <= float(decoded.detach().max()) <= 1


def test_weights_survive_a_round_trip(tiny_spec, tiny_models):
    classifier = load_classifier(tiny_spec, tiny_models.classifier, 10)
    for name, array in weights_of(classifier).items():
        np.testing.assert_array_equal(array, tiny_models.classifier[name])


def resnet_spec(**classifier):
    return tiny(
        data={"channels": 3, "image_size": 32},
        classifier={"architecture": "resnet18", "optimizer": "adam", "learning_rate": 0.001, **classifier},
    )


def test_torchvisions_own_file_gives_all_layers_but_the_last(tmp_path):
    theirs = resnet18().state_dict()
    torch.save(theirs, tmp_path / "resnet18-f37072fd.pth")
    module = build_classifier(resnet_spec(), 10)
    ours = module.with_own_names(read_weights(tmp_path / "resnet18-f37072fd.pth"), new_head=True)
    set_weights(module, ours, "here")
    assert torch.equal(module.net.layer4[1].conv2.weight, theirs["layer4.1.conv2.weight"])
    assert module.net.fc.weight.shape == (10, 512)
    unchanged = module.with_own_names(read_weights(tmp_path / "resnet18-f37072fd.pth"), new_head=False)
    with pytest.raises(ModelError, match=r"net.fc.weight: expected shape \(10, 512\), found \(1000, 512\)"):
        set_weights(module, unchanged, "here")


def test_imagenet_weights_are_fetched_only_where_the_run_file_allows_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"resnet18-f37072fd\.pth, and data\.download is false"):
        build_classifier(resnet_spec(imagenet=True), 10)
    spec = resnet_spec(imagenet=True, weights="resnet18-f37072fd.pth")
    build_classifier(spec, 10)  # the file takes their place; nothing is fetched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("0.weight"), "lack 0.weight"),
        (
            lambda w: w.update({"0.weight": np.zeros((1, 1), np.float32)}),
            "0.weight: expected shape .* found \\(1, 1\\)",
        ),
        (lambda w: w["0.bias"].fill(np.nan), "0.bias: expected finite numbers, found NaN"),
        (lambda w: w.update(extra=np.zeros(1)), "unexpected extra"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message, tiny_spec):
    classifier = build_classifier(tiny_spec, 10)
    weights = weights_of(classifier)
    change(weights)
    with pytest.raises(ModelError, match=f"^mine.safetensors: .*{message}"):
        set_weights(classifier, weights, "mine.safetensors")


def test_weight_files_are_read_in_both_safe_forms(tmp_path, tiny_spec):
    state = build_vae(tiny_spec).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        found = read_weights(tmp_path / name)
        assert found.keys() == state.keys()
        assert all(np.array_equal(found[key], tensor.numpy()) for key, tensor in state.items())


class Unpickled:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled-by-defuse"),))


def test_a_weight_file_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"0.weight": Unpickled()}, "evil.pt")
    with pytest.raises(ModelError, match=r"evil.pt: expected a state dict of tensors"):
        read_weights(Path("evil.pt"))
    assert not Path("unpickled-by-defuse").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"https://example.org/weights.pt\n", b"a,b\n1,2\n"])
@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("safetensors", "a whole safetensors file, found one that is cut off or damaged"),
        ("pt", "a state dict"),
    ],
)
def test_a_broken_weight_file_is_named(tmp_path, content, suffix, expected):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"broken.{suffix}: expected {expected}"):
        read_weights(path)


def test_a_state_dict_of_parameters_or_without_counts_of_batches_is_loaded(tmp_path):
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    older = {name: nn.Parameter(t) for name, t in module.state_dict().items() if "num_batches" not in name}
    torch.save(older, tmp_path / "older.pt")
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    set_weights(other, read_weights(tmp_path / "older.pt"), "older.pt")
    assert torch.equal(other[0].weight, module[0].weight) and other[1].num_batches_tracked == 0


@pytest.mark.parametrize("size", [8, 9, 12, 15, 16, 32])
def test_the_reference_network_takes_images_of_any_size(size):
    network = ReferenceCnn(size, 1, 4, 10).eval()
    assert network(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_a_missing_weight_file_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere.safetensors: expected a file"):
        read_weights(tmp_path / "nowhere.safetensors")


def custom_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))


def test_a_custom_classifier_is_built_by_its_import_path():
    spec = tiny(classifier={"architecture": "custom", "import_path": "tests.core.test_models:custom_net"})
    assert build_classifier(spec, 10)(torch.rand(2, 1, 16, 16)).shape == (2, 10)


ONE_NET = custom_net()


def one_net() -> nn.Module:
    return ONE_NET


def test_a_factory_that_returns_its_one_module_again_is_an_error_that_says_what_to_do():
    """That module would be adapted twice, and hold the weights of another classifier of the run."""
    spec = tiny(classifier={"architecture": "custom", "import_path": "tests.core.test_models:one_net"})
    build_classifier(spec, 10)
    with pytest.raises(
        ModelError, match=r"test_models:one_net: it returned the same module.*let it build a new one"
    ):
        build_classifier(spec, 10)


@pytest.mark.parametrize(
    "path", ["no.such:thing", "tests.core.test_models:missing", "json:dumps", "builtins:dict"]
)
def test_an_import_path_that_gives_no_module_is_an_error_that_names_it(path):
    with pytest.raises(ModelError, match=path):
        build_classifier(tiny(classifier={"architecture": "custom", "import_path": path}), 10)


class LinearAutoencoder(nn.Module):
    """A custom β-VAE for images of 1x16x16 and 4 latent dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(256, 8), nn.Linear(4, 256)

    def encode(self, images):
        return self.down(images.flatten(1)).chunk(2, dim=1)

    def decode(self, codes):
        return torch.sigmoid(self.up(codes)).view(-1, 1, 16, 16)


class Flat(LinearAutoencoder):
    def decode(self, codes):
        return super().decode(codes).flatten(1)


class FiveDimensions(LinearAutoencoder):
    def encode(self, images):
        return torch.zeros(len(images), 5), torch.zeros(len(images), 5)


class Unbounded(LinearAutoencoder):
    def decode(self, codes):
        return super().decode(codes) * 255


class Detached(LinearAutoencoder):
    def decode(self, codes):
        return super().decode(codes).detach()


class NotANumber(LinearAutoencoder):
    def decode(self, codes):
        return super().decode(codes) / 0 * 0


def custom_vae(factory: str, **vae):
    path = f"tests.core.test_models:{factory}"
    return tiny(vae={"architecture": "custom", "import_path": path, **vae})


def test_a_custom_vae_is_imported_by_its_path():
    spec = custom_vae("LinearAutoencoder")
    vae = build_vae(spec)
    images = torch.rand(3, 1, 16, 16)
    expect_autoencoder(vae, images, spec.vae.latent_dim)
    mu, log_variance = vae.encode(images)
    assert mu.shape == log_variance.shape == (3, 4)
    torch.testing.assert_close(torch.sigmoid(vae.decode_logits(mu)), vae.decode(mu))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flat", r"decoded images: expected shape \(2, 1, 16, 16\), found \(2, 256\)"),
        ("FiveDimensions", r"mean: expected shape \(2, 4\), found \(2, 5\)"),
        ("Unbounded", r"expected pixels in \[0, 1\], found .* end the decoder with a sigmoid"),
        ("Detached", "expected gradients from the decoded images to the codes"),
        ("NotANumber", "decoded images: expected finite numbers, found NaN"),
    ],
)
def test_a_custom_vae_that_does_not_fit_is_an_error_of_one_line(factory, message):
    with pytest.raises(ModelError, match=message):
        expect_autoencoder(build_vae(custom_vae(factory)), torch.rand(2, 1, 16, 16), 4)


def test_a_custom_vae_without_its_methods_is_an_error_that_names_the_missing_one():
    with pytest.raises(ModelError, match="custom_net: .* found none called encode"):
        build_vae(custom_vae("custom_net"))


def test_batches_do_not_change_answers(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    codes = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    images = decode_codes(vae, codes)
    np.testing.assert_allclose(Decoder(vae, batch_size=7).decode(codes), images, atol=1e-5)
    parts = [encode_images(vae, part) for part in np.split(images, [7, 20])]
    np.testing.assert_allclose(np.concatenate(parts), encode_images(vae, images), atol=1e-4)
    classifier = load_classifier(tiny_spec, tiny_models.classifier, 10)
    probabilities = predict_probabilities(classifier, images, 9)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(predict(classifier, images), probabilities.argmax(1))


def test_no_images_have_no_answers(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    none = decode_codes(vae, np.zeros((0, 4), np.float32))
    assert none.shape == (0, 1, 16, 16)
    classifier = load_classifier(tiny_spec, tiny_models.classifier, 10)
    assert predict(classifier, none).shape == (0,)


def test_accuracy_is_the_share_answered_right(tiny_spec, tiny_models):
    from defuse_core.data import open_splits

    test = open_splits(tiny_spec.data, tiny_spec.seed).test
    classifier = load_classifier(tiny_spec, tiny_models.classifier, 10)
    assert test is not None
    assert accuracy(classifier, test) == pytest.approx(
        float((predict(classifier, test) == test.labels).mean())
    )
    assert accuracy(classifier, test) == pytest.approx(tiny_models.accuracy["test"])


def test_a_classifier_that_returns_nan_has_no_answer():
    images = np.stack(
        [np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 4, 4), np.zeros((1, 4, 4), np.float32)]
    )
    assert predict(Standardising(), images[:1]).tolist() == [2]
    with pytest.raises(ModelError, match="returns nan for 1 of 2 images"):
        predict(Standardising(), images)
    with pytest.raises(ModelError, match="returns nan for 1,000 of 1,000 images"):
        predict(Standardising(), np.zeros((1000, 1, 4, 4), np.float32))
    logits = torch.tensor([[1.0, 2.0, float("nan")], [3.0, 2.0, 1.0], [-float("inf"), 2.0, 1.0]])
    for answer in (answers_from, lambda *asked: answers_as_in_f32(*asked, bound=0.1)):
        with pytest.raises(ModelError, match="returns nan for 1 of"):
            answer(lambda rows: logits[rows], 3, 2)
        assert answer(lambda rows: logits[1:][rows], 2, 2).tolist() == [0, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's convolutions")
@pytest.mark.parametrize(("channels", "cropped"), [(1, False), (4, True), (16, False)])
def test_a_narrow_strided_convolution_is_trained_on_images_that_its_stride_does_not_divide(channels, cropped):
    """Else oneDNN's gradient writes past the end of its memory; the gradient itself is the same."""
    plain = nn.Conv2d(channels, 8, 1, stride=2)
    convolution, seen = to_device(copy.deepcopy(plain)), []
    convolution.register_forward_hook(lambda _module, images, _found: seen.append(images[0].shape[2]))
    images = torch.rand(8, channels, 16, 16)
    found = convolution(images.contiguous(memory_format=torch.channels_last))
    with torch.inference_mode():
        convolution(images)
    assert seen == [15 if cropped else 16, 16]
    found.square().mean().backward()
    expected = plain.double()(images.double())
    expected.square().mean().backward()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(convolution.weight.grad, plain.weight.grad.float(), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_classes_is_that_of_the_run_file_for_own_architectures_too(tiny_spec):
    order = (*range(1, 10), 0)
    torch.manual_seed(0)
    plain = build_classifier(tiny_spec, 10).eval()
    ordered = build_classifier(tiny_spec.with_fields("classifier", class_order=order), 10).eval()
    ordered.load_state_dict(plain.state_dict())
    images = torch.rand(3, 1, 16, 16)
    assert torch.equal(ordered(images), plain(images)[:, list(order)])
    with pytest.raises(ModelError, match=r"class_order: expected each of the logits 0 to 9 once"):
        build_classifier(tiny_spec.with_fields("classifier", class_order=(0, 0, *range(2, 10))), 10)
