import platform

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from defuse_core.artifacts import Models
from defuse_core.codec import decode
from defuse_core.data import open_splits
from defuse_core.device import cpu_threads, device
from defuse_core.errors import DataError, DefuseError, ModelError, RunFileError, RunMismatchError
from defuse_core.local import LocalCompute
from defuse_core.models import build_vae, kl_to_prior, to_device, to_tensor
from defuse_core.protocols import silent
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import FolderStore
from defuse_core.train import _expect_validation, train, train_part, train_side_by_side
from defuse_core.training import minibatches, set_learning_rate
from tests.conftest import tiny, trained_models
from tests.core.test_models import LinearAutoencoder


def test_training_learns(tiny_models):
    assert tiny_models.accuracy["test"] > 0.6
    losses = [row.reconstruction for row in tiny_models.vae_history]
    assert losses[-1] < 0.9 * losses[0]
    assert tiny_models.images == {"train": 300, "validation": tiny_models.images["validation"], "test": 539}


def test_the_weight_of_kl_grows_linearly_and_then_stays():
    spec = tiny(vae={"epochs": 4, "beta": 0.3, "kl_warmup_steps": 40}, classifier={"epochs": 1})
    history = trained_models(spec).vae_history  # 19 steps an epoch
    assert [row.beta for row in history] == pytest.approx([0.3 * 19 / 40, 0.3 * 38 / 40, 0.3, 0.3])


def test_the_same_seed_gives_the_same_weights_bit_for_bit(finished_run, tiny_models):
    stored = finished_run / "runs" / "tiny" / "models.safetensors"  # trained by a command of its own
    again = decode(Models, stored.read_bytes(), "models")
    for ours, theirs in ((again.classifier, tiny_models.classifier), (again.vae, tiny_models.vae)):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


class KilledError(Exception): ...


def test_the_papers_vae_is_trained_by_plain_adam_on_reconstruction_plus_weighted_kl(tiny_spec, tiny_models):
    spec = tiny(vae={"epochs": 2}, classifier={"epochs": 1})
    section, images = spec.vae, open_splits(spec.data, spec.seed).train
    torch.manual_seed(torch_seed(spec.seed, "vae"))
    vae = to_device(build_vae(spec))
    optimizer = torch.optim.Adam(vae.parameters(), lr=section.learning_rate, fused=True)
    step = 0
    with cpu_threads(1):
        for epoch in range(section.epochs):
            noise = torch.Generator(device()).manual_seed(torch_seed(spec.seed, "vae", "noise", epoch))
            for rows in minibatches(len(images), section.batch_size, generator(spec.seed, "vae", epoch)):
                step += 1
                batch = to_tensor(images.batch(rows))
                mu, log_variance = vae.encode(batch)
                epsilon = torch.randn(mu.shape, generator=noise, device=mu.device)
                logits = vae.decode_logits(mu + torch.exp(0.5 * log_variance) * epsilon)
                loss = F.binary_cross_entropy_with_logits(logits, batch, reduction="sum") / len(batch)
                kl = 0.5 * (mu.square() + log_variance.exp() - log_variance - 1)
                beta = section.beta * min(1.0, step / section.kl_warmup_steps)
                optimizer.zero_grad(set_to_none=True)
                (loss + beta * (kl.sum() / len(batch))).backward()
                optimizer.step()
    ours = trained_models(spec).vae
    for name, tensor in vae.state_dict().items():
        np.testing.assert_array_equal(ours[name], tensor.cpu().numpy())


RECOMMENDED_VAE = {
    "architecture": "convolutional",
    "schedule": "one_cycle",
    "class_weight": 10.0,
    "learning_rate": 0.003,
    "epochs": 8,
}


@pytest.fixture(scope="module")
def convolutional() -> Models:
    return trained_models(tiny(vae=RECOMMENDED_VAE, classifier={"epochs": 1}))


def test_the_convolutional_vae_learns_faster_than_the_papers(convolutional, tiny_models):
    ours, papers = convolutional.vae_history[-1], tiny_models.vae_history[len(convolutional.vae_history) - 1]
    assert ours.reconstruction < 0.95 * papers.reconstruction
    assert (convolutional.kl_per_dimension > 0.1).all()


def test_the_class_head_learns_the_classes_from_the_codes_and_is_not_kept(convolutional):
    losses = [row.class_loss for row in convolutional.vae_history]
    assert losses[-1] < 0.5 * losses[0]
    assert convolutional.vae.keys() == build_vae(tiny(vae=RECOMMENDED_VAE)).state_dict().keys()


def test_an_interrupted_training_resumes_within_its_schedule_and_with_its_class_head(
    convolutional, tmp_path, monkeypatch
):
    monkeypatch.setattr("defuse_core.training.CHECKPOINT_EVERY_S", 0.0)

    def kill(doing: str, done: int, total: int, unit: str) -> None:
        if doing == "training the β-VAE" and done >= 1000:
            raise KilledError

    spec = tiny(vae=RECOMMENDED_VAE, classifier={"epochs": 1})
    with pytest.raises(KilledError):
        train(spec, FolderStore(tmp_path), progress=kill)
    resumed = train(spec, FolderStore(tmp_path), progress=silent)
    for name, array in resumed.vae.items():
        np.testing.assert_array_equal(array, convolutional.vae[name])
    assert resumed.vae_history == convolutional.vae_history


def test_a_one_cycle_schedule_rises_over_a_tenth_of_the_steps_and_falls_to_zero():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    section, rates = tiny(vae={"schedule": "one_cycle", "learning_rate": 0.5}).vae, []
    for step in range(1, 101):
        set_learning_rate(optimizer, section, step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert rates[54] == pytest.approx(0.25)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_a_custom_vae_with_no_epochs_is_used_unchanged():
    vae = {
        "architecture": "custom",
        "import_path": "tests.core.training.test_train:ready_autoencoder",
        "epochs": 0,
    }
    models = trained_models(tiny(vae=vae, classifier={"epochs": 1}))
    assert models.vae_history == ()
    for name, tensor in ready_autoencoder().state_dict().items():
        np.testing.assert_array_equal(models.vae[f"module.{name}"], tensor.numpy())


def test_a_custom_vae_can_be_trained():
    vae = {
        "architecture": "custom",
        "import_path": "tests.core.training.test_train:ready_autoencoder",
        "epochs": 4,
    }
    history = trained_models(tiny(vae=vae, classifier={"epochs": 1})).vae_history
    assert history[-1].reconstruction < 0.9 * history[0].reconstruction


def ready_autoencoder() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LinearAutoencoder()


class WithDropout(LinearAutoencoder):
    def encode(self, images):
        return super().encode(F.dropout(images, 0.2, self.training))


def test_an_interrupted_training_of_a_vae_with_dropout_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("defuse_core.training.CHECKPOINT_EVERY_S", 0.0)

    def kill(doing: str, done: int, total: int, unit: str) -> None:
        if doing == "training the β-VAE" and done >= 700:
            raise KilledError

    path = "tests.core.training.test_train:WithDropout"
    spec = tiny(vae={"architecture": "custom", "import_path": path, "epochs": 4}, classifier={"epochs": 1})
    whole = trained_models(spec)
    with pytest.raises(KilledError):
        train(spec, FolderStore(tmp_path), progress=kill)
    resumed = train(spec, FolderStore(tmp_path), progress=silent)
    for name, array in resumed.vae.items():
        np.testing.assert_array_equal(array, whole.vae[name])


def test_a_training_interrupted_in_each_part_resumes_to_the_same_weights_bit_for_bit(tmp_path, monkeypatch):
    spec = tiny(classifier={"epochs": 6}, vae={"epochs": 10})
    whole = trained_models(spec)
    monkeypatch.setattr("defuse_core.training.CHECKPOINT_EVERY_S", 0.0)
    classifier, vae = "training the classifier", "training the β-VAE"

    def trained(until: dict[str, int]) -> tuple[Models | None, dict[str, int]]:
        """Train until so many images of a part; return the models, if it ends, and the least that each part told."""
        least: dict[str, int] = {}

        def kill(doing: str, done: int, total: int, unit: str) -> None:
            least[doing] = min(done, least.get(doing, total))
            if done >= until.get(doing, total + 1):
                raise KilledError

        try:
            return train(spec, FolderStore(tmp_path), progress=kill), least
        except KilledError:
            return None, least

    killed, least = trained(until={classifier: 1000})
    assert killed is None and least.keys() == {classifier}
    killed, least = trained(until={vae: 1500})
    assert killed is None and least[classifier] > 500
    resumed, least = trained(until={})
    assert least.keys() == {vae} and least[vae] > 700
    assert resumed is not None
    for ours, theirs in ((resumed.classifier, whole.classifier), (resumed.vae, whole.vae)):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
    assert resumed.vae_history == whole.vae_history


def test_another_seed_gives_other_weights():
    spec = tiny(classifier={"epochs": 1}, vae={"epochs": 1})
    one, other = (trained_models(spec.model_copy(update={"seed": seed})) for seed in (0, 1))
    assert not np.array_equal(other.vae["decoder.0.weight"], one.vae["decoder.0.weight"])


def test_the_best_epoch_on_validation_is_kept_where_the_run_file_says_so():
    spec = tiny(
        classifier={"keep": "best_validation", "optimizer": "adam", "learning_rate": 0.02, "epochs": 8},
        vae={"epochs": 1},
    )
    models = trained_models(spec)
    assert models.accuracy["validation"] == max(row.validation for row in models.classifier_history)


@pytest.mark.parametrize(
    ("section", "change"),
    [("classifier", {"keep": "best_validation"}), ("correct", {"choose_by": "validation"})],
)
def test_choosing_by_validation_without_validation_images_is_refused_before_training(section, change):
    with pytest.raises(RunFileError, match=f"^{section}.*needs validation images"):
        trained_models(tiny(data={"validation_share": 0.0}, **{section: change}))


def test_a_classifier_that_is_not_trained_needs_no_validation_images_to_keep_its_best_epoch():
    splits = open_splits(tiny(data={"validation_share": 0.0}).data, 0)
    _expect_validation(tiny(classifier={"keep": "best_validation", "epochs": 0, "weights": "a.pt"}), splits)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"correct": {"choose_by": "tune", "train_images": 100}}, "correct.train_images: a sample"),
        (
            {"correct": {"choose_by": "tune"}, "vae": {"decode": "anchored"}},
            "vae.decode: anchored: training images",
        ),
    ],
)
def test_clean_accuracy_is_not_measured_on_other_images_than_before(sections, line):
    with pytest.raises(RunFileError, match=f"^{line}.*set data.validation_share"):
        trained_models(tiny(data={"validation_share": 0.0}, **sections))


def test_pretrained_models_with_no_epochs_are_used_unchanged(tmp_path, tiny_models):
    for name in ("classifier", "vae"):
        save_file(
            {k: torch.tensor(v) for k, v in getattr(tiny_models, name).items()},
            tmp_path / f"{name}.safetensors",
        )
    spec = tiny(
        classifier={"epochs": 0, "weights": tmp_path / "classifier.safetensors"},
        vae={"epochs": 0, "weights": tmp_path / "vae.safetensors"},
    )
    models = trained_models(spec)
    assert models.accuracy == tiny_models.accuracy
    for part, shares in models.class_accuracy.items():
        np.testing.assert_array_equal(shares, tiny_models.class_accuracy[part])
        assert models.accuracy[part] - 0.05 < models.balanced_accuracy[part] < models.accuracy[part] + 0.05
    assert models.classifier_history == models.vae_history == ()


def test_a_classifier_that_numbers_the_classes_otherwise_gets_a_warning(tmp_path, tiny_models, caplog):
    last = sorted(name.removesuffix(".bias") for name in tiny_models.classifier if name.endswith(".bias"))[-1]
    other = {
        k: torch.tensor(np.roll(v, 3, 0) if k.startswith(last) else v)
        for k, v in tiny_models.classifier.items()
    }
    save_file(other, tmp_path / "other.safetensors")
    fields = {"epochs": 0, "weights": tmp_path / "other.safetensors"}
    trained_models(tiny(classifier=fields, vae={"epochs": 1}))
    assert "does it number the classes in this order? 0, 1, 2" in caplog.text
    assert "train: the classifier is hardly better than guessing" in caplog.text


def test_vae_weights_that_do_not_fit_fail_before_the_classifier_is_trained(tmp_path, tiny_models):
    save_file({"nothing": torch.zeros(1)}, tmp_path / "vae.safetensors")
    done = []
    with pytest.raises(ModelError, match=r"vae\.safetensors: the weights lack"):
        spec = tiny(vae={"weights": tmp_path / "vae.safetensors"})
        train(spec, FolderStore(tmp_path), progress=lambda *step: done.append(step))
    assert not done


def test_a_training_resumes_only_on_the_images_that_it_started_on(tmp_path):
    short = {"classifier": {"epochs": 1}, "vae": {"epochs": 1}}
    train(tiny(**short), FolderStore(tmp_path), progress=silent)
    with pytest.raises(RunMismatchError, match="the images changed since this run began to train"):
        train(tiny(data={"train_images": 299}, **short), FolderStore(tmp_path), progress=silent)


def test_a_diverged_training_is_an_error_of_one_line():
    with pytest.raises(ModelError, match="training the classifier diverged"):
        trained_models(tiny(classifier={"optimizer": "adam", "learning_rate": 1e30, "epochs": 3}))


def test_a_classifier_for_other_classes_is_refused_before_training():
    spec = tiny(
        classifier={"architecture": "custom", "import_path": "tests.core.training.test_train:seven_classes"}
    )
    with pytest.raises(ModelError, match=r"expected logits of shape \(2, 10\) .* found \(2, 7\)"):
        trained_models(spec)


def seven_classes() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 7))


def test_a_classifier_without_a_parameter_to_tune_is_refused_before_the_vae_is_trained(tmp_path, monkeypatch):
    (tmp_path / "frozen_network.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).requires_grad_(False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    weights = tmp_path / "own.safetensors"
    save_file({"1.weight": torch.zeros(10, 256), "1.bias": torch.zeros(10)}, weights)
    own = {"architecture": "custom", "import_path": "frozen_network:build", "weights": str(weights)}
    with pytest.raises(ModelError, match="expected parameters to fine-tune, found none"):
        trained_models(tiny(classifier=own | {"epochs": 0}))


@pytest.mark.parametrize(
    ("brought", "message"),
    [
        (
            {"weights": "nowhere.safetensors"},
            f"nowhere.safetensors: expected a file of weights, found none on {platform.node()}$",
        ),
        ({"architecture": "custom", "import_path": "no_such_module:build"}, "no_such_module"),
    ],
)
def test_a_classifier_to_train_on_that_cannot_be_read_is_refused_before_the_vae_is_trained(
    brought, message, tmp_path
):
    spec, store = tiny(classifier=brought), FolderStore(tmp_path)
    with pytest.raises(DefuseError, match=message):
        train_side_by_side(spec, store, LocalCompute())
    assert not [key for key in store.list() if "vae" in key]


def of_files(root, **sections):
    """A spec of 6 training, 6 validation and 200 test files."""
    for part, count in (("train", 3), ("validation", 3), ("test", 100)):
        for label in "ab":
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (16, 16), number).save(root / part / label / f"{number:02}.png")
    data = {"name": "folder", "root": str(root), "validation_share": 0.0, "train_images": None}
    return tiny(data=data, **sections)


def test_a_test_image_that_is_cut_off_is_refused_before_the_vae_is_trained(tmp_path):
    spec, store = of_files(tmp_path / "pictures"), FolderStore(tmp_path / "run")
    cut = tmp_path / "pictures/test/a/02.png"  # which no fingerprint is of
    cut.write_bytes(cut.read_bytes()[:40])
    with pytest.raises(
        DataError, match=r"pictures/test/a/02\.png: expected an image, found .*; repair or remove"
    ):
        train_side_by_side(spec, store, LocalCompute())
    assert store.list() == []


def test_files_that_nothing_decodes_are_looked_at_by_one_of_two_trainings(tmp_path, monkeypatch):
    spec, seen = of_files(tmp_path / "pictures", classifier={"epochs": 1}, vae={"epochs": 1}), []
    monkeypatch.setattr("defuse_core.data._has_both_ends", lambda path: not seen.append(path))
    trained_models(spec)
    train_part(spec, FolderStore(tmp_path / "a"), "classifier", progress=silent)
    assert not seen
    for _ in range(2):  # it looks although the other one has a checkpoint, and not again once it has its own
        train_part(spec, FolderStore(tmp_path / "a"), "vae", progress=silent)
        assert len(seen) == len(set(seen)) == 206
    monkeypatch.setattr("defuse_core.train.group_size", lambda: 2)
    train_part(spec, FolderStore(tmp_path / "c"), "vae", progress=silent)
    assert len(seen) == 206 + 103  # by one of two workers


def test_an_epoch_takes_every_row_once_but_no_batch_of_one():
    rows = list(minibatches(9, 4, np.random.default_rng(0)))
    assert [len(batch) for batch in rows] == [4, 4]
    assert sorted(np.concatenate(list(minibatches(10, 4, np.random.default_rng(0))))) == list(range(10))


def test_the_kl_of_the_prior_to_itself_is_zero_and_grows_with_mu():
    zero = torch.zeros(1, 3)
    assert kl_to_prior(zero, zero).sum() == 0
    torch.testing.assert_close(kl_to_prior(zero + 2, zero), torch.full((1, 3), 2.0))
