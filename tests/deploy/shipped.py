"""What deploy/ ships, parsed: the Dockerfile's instructions, services, Kubernetes documents, commands."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
ENVIRONMENT = {  # what deploy/.env would hold
    name: f"test-{name.lower().replace('_', '-')}"
    for name in re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text())
}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def compose() -> dict[str, Any]:
    """Return deploy/compose.yaml with its variables filled in from ENVIRONMENT, as Compose does."""
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = yaml.safe_load(interpolated(text, ENVIRONMENT))
    return tree


def interpolated(text: str, environment: Mapping[str, str]) -> str:
    """Return the text with ${NAME:?message} and ${NAME:-default} replaced."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: environment[match[1]], text)
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: environment.get(match[1], match[2]), text)


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order, as ("COPY", "a b"); continued lines are joined."""
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def arguments() -> dict[str, str]:
    """Return the Dockerfile's build arguments and their defaults."""
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)


@functools.cache
def documents() -> list[tuple[str, dict[str, Any]]]:
    """Return every Kubernetes document with the name of its file."""
    files = sorted(KUBERNETES.glob("*.yaml"))
    return [
        (file.name, tree) for file in files for tree in yaml.safe_load_all(file.read_text(encoding="utf-8"))
    ]


def document(kind: str) -> dict[str, Any]:
    (found,) = (tree for _, tree in documents() if tree["kind"] == kind)
    return found


def ray_specs() -> list[tuple[str, dict[str, Any]]]:
    """Return the RayClusterSpec of the cluster, the job and the service."""
    return [
        ("RayCluster", document("RayCluster")["spec"]),
        ("RayJob", document("RayJob")["spec"]["rayClusterSpec"]),
        ("RayService", document("RayService")["spec"]["rayClusterConfig"]),
    ]


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Return every pod spec of the Ray documents."""
    found = []
    for kind, spec in ray_specs():
        found.append((f"{kind} head", spec["headGroupSpec"]["template"]["spec"]))
        for group in spec["workerGroupSpecs"]:
            found.append((f"{kind} {group['groupName']}", group["template"]["spec"]))
    return found


def command_lines(program: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (file, arguments) of each line that calls `program` in deploy/ or in a README's code blocks."""
    files = [*sorted(DEPLOY.glob("*.yaml")), *sorted(KUBERNETES.glob("*.yaml")), DEPLOY / "Dockerfile"]
    for file in files:
        lines = [line.lstrip("#").strip() for line in file.read_text(encoding="utf-8").splitlines()]
        yield from _calls(program, file.name, lines)
    readmes = (readme for folder in ROOT.glob("[!.]*/") for readme in folder.rglob("README.md"))
    for readme in (ROOT / "README.md", *sorted(readmes)):
        blocks = re.findall(
            r"```(?:sh|bash|console)\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL
        )
        yield from _calls(program, str(readme.relative_to(ROOT)), "\n".join(blocks).splitlines())


def _calls(program: str, where: str, lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        called = re.match(
            rf"(?:\$ |entrypoint: |[A-Z_]+=\S+ |docker compose .* exec (?:--\S+ )*\S+ )*{program} (?=\S)",
            line,
        )
        if called and " ... " not in line:
            words = shlex.split(line[called.end() :], comments=True)
            yield (
                where,
                words[: min((words.index(sign) for sign in (">", "|") if sign in words), default=None)],
            )
