"""GPU paths on a GPU that is pretended: every tensor is moved to it, and what comes out is what the CPU finds."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from defuse_core.config.loading import dump_run_file
from tests.conftest import TINY, recommended

ROOT = Path(__file__).parents[2]


def run_and_serve(name: str, store: str, run_file: str) -> None:
    """Make a run, save the answers of its served classifier, and print on which device that is."""
    from pathlib import Path

    import numpy as np

    from defuse_core.config import ServeSection, load_run_file
    from defuse_core.local import LocalCompute
    from defuse_core.pipeline import run_defuse
    from defuse_core.runs import Run
    from defuse_core.store import FolderStore
    from defuse_core.training.reference_models import ReferenceAnnotators
    from services.serving.candidate import prepare_candidate
    from services.serving.model import LoadedModel

    run, compute = Run.start(FolderStore(Path(store)), name, load_run_file(Path(run_file))), LocalCompute()
    run_defuse(run, compute, ReferenceAnnotators(run, compute))
    _, candidate = prepare_candidate(run)
    served = LoadedModel(candidate, ServeSection())
    images = np.random.default_rng(0).random((3, *served.input_spec.shape), np.float32)
    np.save(f"{store}/{name}.npy", served.predict(images).probabilities)
    print(len(candidate.scenario), "scenarios on", next(served.classifier.parameters()).device)


class KeepingVae(nn.Module):
    """A β-VAE of a user's own, which keeps a tensor of its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(256, 8), nn.Linear(4, 256)
        self.grid: Tensor | None = None

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.grid is None:
            self.grid = torch.linspace(0, 1, 256, device=images.device)
        return self.down(images.flatten(1) + self.grid).chunk(2, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.sigmoid(self.up(codes)).view(-1, 1, 16, 16)


def train_own_vae(folder: str) -> None:
    from pathlib import Path

    from defuse_core.protocols import silent
    from defuse_core.store import FolderStore
    from defuse_core.train import train_part
    from tests.conftest import tiny

    own = {"architecture": "custom", "import_path": "tests.e2e.test_gpu:KeepingVae"}
    train_part(
        tiny(vae={**own, "epochs": 1, "batch_size": 100}), FolderStore(Path(folder)), "vae", progress=silent
    )


ON_GPU = f"""
import sys
from tests.e2e.forked_commands import no_figures
from tests.pretended_gpu import pretended_gpu
{inspect.getsource(run_and_serve)}
{inspect.getsource(train_own_vae)}
with pretended_gpu():
    no_figures()
    run_and_serve(*sys.argv[1:])
    train_own_vae(sys.argv[2] + "/own")
"""


def on_gpu(*words: str) -> str:
    """Run and serve in a process of its own, whose output is returned."""
    done = subprocess.run(
        [sys.executable, "-c", ON_GPU, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("no_figures")
def test_on_a_gpu_no_tensor_is_left_behind_and_the_cpu_finds_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each step on the pretended GPU is slow. Models trained so briefly still have scenarios, some of them in doubt.
    spec = recommended(
        classifier={"epochs": 8, "batch_size": 32},
        vae={"decode": "anchored", "epochs": 5, "batch_size": 32, "accept": "blind"},
        identify={"scale": 3.0},
        review={"reference": {**TINY["review"]["reference"], "count": 2, "epochs": 6}},
        correct={"stack": 2},
        judges={"count": 1, "epochs": 2},
    )
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_run_file(spec))
    said = {"pretended:0": on_gpu("gpu", str(tmp_path), str(run_file))}
    run_and_serve("cpu", str(tmp_path), str(run_file))
    said["cpu"] = capsys.readouterr().out
    for device, output in said.items():
        assert re.search(rf"^[1-9]\d* scenarios on {device}$", output, re.MULTILINE)
    np.testing.assert_allclose(np.load(tmp_path / "gpu.npy"), np.load(tmp_path / "cpu.npy"), atol=1e-5)
    made = sorted((tmp_path / "cpu").glob("*.safetensors"))
    assert len(made) > 9
    for path in made:
        found, expected = load_file(tmp_path / "gpu" / path.name), load_file(path)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(
                found[name], array, rtol=1e-4, atol=1e-5, err_msg=f"{path.name}: {name}"
            )
