"""What a new process of Ray imports: each trial and each replica is one, and a library takes up to two seconds."""

import subprocess
import sys

import pytest

LATE = ("sklearn", "scipy.stats", "torch._dynamo", "torchvision", "matplotlib")  # what few processes call
STEP = """
import torch
from defuse_core.training.loop import Adam
parameter = torch.nn.Parameter(torch.ones(1))
optimizer = Adam([parameter], 0.1)
parameter.sum().backward()
optimizer.step()
"""


@pytest.mark.parametrize(
    "work",
    ["import cluster.sweep", "import services.serving.deployment", "import defuse_core.pipeline", STEP],
    ids=["trial", "replica", "driver", "step"],
)
def test_a_process_imports_nothing_that_it_does_not_call(work):
    code = f"import sys\n{work}\nprint([name for name in {LATE} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
