"""Plain beside anchored decoding on somebody's photographs, from an .npz file to the decision.

    python tests/bench/photos.py layout photos.npz photos/          # as folders: train/CLASS/*.png and so on
    python tests/bench/photos.py classifier photos/ photos_net.pt2  # a small ResNet of one's own, as a program
    python tests/bench/photos.py decodings runs photos --picture anchored.png

Between the second and the third: `defuse init photos/ --classifier photos_net.pt2` and `defuse run photos.yaml`. The
third takes the run's β-VAE, and says of test images, moved by 1, 2, 4 and 8 times the posterior's noise, what the
classifier gets wrong and what the reference models and judges, who are independent of it, still see.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

from defuse_core.artifacts import F32, I64, Models, ReferenceSet
from defuse_core.config import ClassifierSet, DataSection
from defuse_core.data import Images, open_splits
from defuse_core.identify import draw_noise, encode_posterior
from defuse_core.models import Decoder, load_classifier, load_vae, predict
from defuse_core.runs import Run
from defuse_core.seeds import generator
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import load_reference_models, mean_probabilities

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
IMAGES = 1000
MOVED = (2, 4)  # times the noise, of the picture
PICTURES, SIDE, GAP = 8, 128, 8  # columns of the picture, pixels of an image and between images
NAMES_WIDTH = 140  # pixels left of the images


@click.group()
def main() -> None:
    """Photographs."""


@main.command()
@click.argument("archive", type=Path)
@click.argument("folder", type=Path)
def layout(archive: Path, folder: Path) -> None:
    """Write the parts of ARCHIVE as FOLDER/PART/CLASS/NUMBER.png."""
    with np.load(archive, allow_pickle=False) as arrays:
        for part in ("train", "validation", "test"):
            for number, (pixels, label) in enumerate(
                zip(arrays[f"{part}_images"], arrays[f"{part}_labels"], strict=True)
            ):
                path = folder / part / str(arrays["classes"][label]) / f"{number:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.transpose(1, 2, 0)).save(path)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels_out) for _ in range(3)])
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.norms[2](self.shortcut(x)))


def small_resnet(classes: int, width: int = 24) -> nn.Module:
    """Return an untrained classifier of images in [0, 1]."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width),
        Block(width, 2 * width),
        Block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def from_folder(folder: Path, size: int) -> tuple[Images, Images, int]:
    """Return training and test images of size x size pixels, and the number of classes."""
    splits = open_splits(DataSection(name="folder", root=folder, image_size=size, channels=3), 0).loaded()
    assert splits.test is not None
    return splits.train, splits.test, len(splits.classes)


@main.command()
@click.argument("folder", type=Path)
@click.argument("file", type=Path)
@click.option("--epochs", default=14)
@click.option("--size", default=32, help="Pixels of a side, a multiple of 8.")
def classifier(folder: Path, file: Path, epochs: int, size: int) -> None:
    """Train a small ResNet on FOLDER and save it with torch.export.save."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    train, test, classes = from_folder(folder, size)
    net, batch = small_resnet(classes), min(128, len(train) // 16)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = epochs * (len(train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    for epoch in range(epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(train) - batch + 1, batch):
            rows = order[start : start + batch]
            images = augmented(torch.from_numpy(train.batch(rows)), rng)
            loss = F.cross_entropy(net(images), torch.from_numpy(train.labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        right = (predict(net.eval(), test) == test.labels).mean()
        net.train()
        click.echo(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}, test {right:.1%}")
    shapes = ({0: torch.export.Dim("batch")},)
    example = (torch.rand(2, 3, size, size),)
    torch.export.save(torch.export.export(net.eval(), example, dynamic_shapes=shapes), file)


def augmented(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Mirror every second image, and shift all by up to 4 pixels."""
    mirrored = torch.from_numpy(rng.random(len(images)) < 0.5).view(-1, 1, 1, 1)
    images = torch.where(mirrored, images.flip(3), images)
    y, x = rng.integers(0, 9, 2)
    size = images.shape[2]
    return F.pad(images, (4, 4, 4, 4), mode="reflect")[:, :, y : y + size, x : x + size]


@main.command()
@click.argument("store", type=Path)
@click.argument("name")
@click.option("--picture", type=Path, help="PNG: originals, plain and anchored decodings.")
def decodings(store: Path, name: str, picture: Path | None) -> None:
    """Print what is seen in plain and in anchored decodings of test images of the run NAME in STORE."""
    run = Run.open(FolderStore(store), name)
    spec, models = run.spec, run.load(Models)
    assert models is not None
    test = open_splits(spec.data, spec.seed).test
    assert test is not None
    test = test.take(slice(0, None, max(1, len(test) // IMAGES))).take(slice(0, IMAGES))
    net, vae = load_classifier(spec, models.classifier, len(models.classes)), load_vae(spec, models.vae)
    watchers = {
        key: load_reference_models(spec, section, found, len(models.classes))
        for key, section in watching(run).items()
        if (found := run.load(ReferenceSet, key)) is not None
    }
    mu, sigma = encode_posterior(vae, test, 256)
    noise = draw_noise(spec.identify.model_copy(update={"draws": 1, "scale": 1.0, "noise": "posterior"}),
                       sigma, generator(0, "bench"))[:, 0]  # fmt: skip
    decoders = {"plain": Decoder(vae), "anchored": Decoder(vae, test)}
    original = predict(net, test) == test.labels
    seen = {key: answers(nets, test.batch()) == test.labels for key, nets in watchers.items()}
    click.echo(f"{len(test)} test images: right {original.mean():.1%}, "
               + ", ".join(f"{key} see {hits.mean():.1%}" for key, hits in seen.items()))  # fmt: skip
    for decode, decoder in decoders.items():
        for scale in SCALES:
            shown = decoder.decode(mu + np.float32(scale) * noise, np.arange(len(test)))
            right = predict(net, shown) == test.labels
            line = f"{decode:9}{scale:4g} x noise: wrong {1 - right.mean():6.1%}, "
            line += f"newly wrong {(~right)[original].mean():6.1%}"
            for key, nets in watchers.items():
                line += f", {key} still see {(answers(nets, shown) == test.labels)[seen[key]].mean():6.1%}"
            click.echo(line)
    if picture is not None:
        draw(test, mu, noise, decoders, picture)


def watching(run: Run) -> dict[str, ClassifierSet]:
    """Return the sections of the run file that describe models independent of the classifier."""
    return {"references": run.spec.review.reference, "judges": run.spec.judges}


def answers(nets: list[nn.Module], images: F32) -> I64:
    """Return the class that the models give the highest mean probability, (n,)."""
    found: I64 = mean_probabilities(nets, images).argmax(axis=1)
    return found


def draw(test: Images, mu: F32, noise: F32, decoders: dict[str, Decoder], path: Path) -> None:
    """Save rows of the originals, their plain decodings, and anchored ones at MOVED times the noise."""
    rows = np.concatenate([np.flatnonzero(test.labels == label)[:1] for label in np.unique(test.labels)])
    rows = rows[:PICTURES]
    lines = {"original": test.batch(rows), "unanchored": decoders["plain"].decode(mu[rows])}
    for scale in MOVED:
        moved = mu[rows] + np.float32(scale) * noise[rows]
        lines[f"anchored x{scale}"] = decoders["anchored"].decode(moved, rows)
    size = SIDE + GAP
    sheet = Image.new("RGB", (NAMES_WIDTH + len(rows) * size - GAP, len(lines) * size - GAP), "white")
    for top, (name, line) in enumerate(lines.items()):
        middle = top * size + SIDE // 2
        ImageDraw.Draw(sheet).text((0, middle), name, "black", ImageFont.load_default(20), anchor="lm")
        for left, pixels in enumerate(line):
            levels = np.round(255 * pixels.transpose(1, 2, 0)).astype(np.uint8)
            image = Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(image, (NAMES_WIDTH + left * size, top * size))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()
