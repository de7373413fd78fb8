"""What a new process of Ray imports: each trial and each replica is one, and a library takes up to two seconds."""

import json
import subprocess
import sys

LATE = (  # what few processes call
    "sklearn",
    "scipy.optimize",
    "scipy.stats",
    "torch._dynamo",
    "torchvision",
    "matplotlib",
    "mlflow",
)
STEP = """
import torch
from defuse_core.training import Adam
parameter = torch.nn.Parameter(torch.ones(1))
optimizer = Adam([parameter], 0.1)
parameter.sum().backward()
optimizer.step()
"""
WORK = {
    "trial": "import cluster.ray_train_tune",
    "replica": "import services.serving.deployment",
    "driver": "import defuse_core.pipeline",
    "step": STEP,
    "command, with or without --track": "import services.cli, services.tracking",
}
PROGRAM = """
import json, sys
late, work = map(json.loads, sys.argv[1:])
imported = {}
for name, code in work.items():
    before = set(sys.modules)
    exec(code)
    imported[name] = [module for module in late if module in sys.modules.keys() - before]
print(json.dumps(imported))
"""


def test_a_process_imports_nothing_that_it_does_not_call():
    """All kinds of work in one process, which begins with nothing imported: none may import what is late."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(LATE), json.dumps(WORK)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {name: [] for name in WORK}
