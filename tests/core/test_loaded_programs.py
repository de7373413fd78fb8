"""Programs of torch.export with names, sizes and conditions of many kinds pass the inspection and answer alike."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from defuse_core.models.programs import load_program


class WithNames(nn.Module):
    """Has a layer inside another whose name is that of an attribute of programs, and names with spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"graph": nn.Linear(12, 3), "head a": nn.Linear(3, 3)})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"all scores": self.encoder["head a"](self.encoder["graph"](images.flatten(1)))}


class WithFractions(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        half = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear")
        return half.mean((2, 3)) / images.shape[0] ** 0.5


class WithWindows(nn.Module):
    """Pads images to windows of 8 pixels, as Swin does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        padded = nn.functional.pad(images, (0, (8 - width % 8) % 8, 0, (8 - height % 8) % 8))
        count, channels, height, width = padded.shape
        windows = padded.view(count, channels, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3, 5)
        means = windows.reshape(-1, channels, 8, 8).mean((2, 3))
        return means.view(count, -1, channels).mean(1)


class WithChoice(nn.Module):
    """Has sizes that depend on the values of images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3))
        bright = (means[:, 0] > 0).nonzero()[:, 0]
        torch._check(bright.shape[0] >= 1)
        return means + means.index_select(0, bright).sum(0)


class WithBrightest(nn.Module):
    """Divides images by the brightest pixel, a number."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) / images.max().item()


class WithCount(nn.Module):
    """Gives conditions on a number of pixels, joined and negated."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        count: Any = (images.mean((2, 3)) > 0).sum().item()
        torch._check((count >= 0) & (count <= images.shape[0] * 3))
        torch._check(torch.sym_not(count == -1))
        return images.mean((2, 3)) + count


def saved(program: torch.export.ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "make", [WithNames, WithFractions, WithWindows, WithChoice, WithBrightest, WithCount]
)
def test_programs_with_names_sizes_and_conditions_of_many_kinds_are_loaded(make):
    images, auto = torch.rand(2, 3, 16, 16), torch.export.Dim.AUTO
    sizes = {0: torch.export.Dim("batch")} | ({} if make is WithNames else {2: auto, 3: auto})
    net = make().eval()
    if make is WithNames:
        images = images[..., :2, :2]
    program = torch.export.export(net, (images,), dynamic_shapes=(sizes,))
    torch.testing.assert_close(load_program(saved(program), "net.pt2")(images), net(images))


class WithFunctions(nn.Module):
    """Calls functions from several places of torch, which strict exports name as the source of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU())
        self.head = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(nn.functional.avg_pool2d(self.layers(images), 2)) + 1
        means = torch.cat([maps.flatten(2), maps.flatten(2)], 2).mean(2)
        return self.head(nn.functional.softmax(means / torch.linalg.norm(means, dim=1, keepdim=True), 1))


@pytest.mark.parametrize("strict", [False, True])
def test_strict_exports_are_loaded(strict):
    images, net = torch.rand(2, 3, 8, 8), WithFunctions().eval()
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (images,), dynamic_shapes=sizes, strict=strict)
    sources = {node.meta.get("source_fn_stack", [("", "")])[-1][1] for node in program.graph.nodes}
    assert not strict or torch.relu in sources
    torch.testing.assert_close(load_program(saved(program), "net.pt2")(images), net(images))
