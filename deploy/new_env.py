"""Write deploy/.env: the secrets that compose.yaml asks for, fresh from the system's random numbers."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

ENV_FILE = Path(__file__).with_name(".env")
RANDOM = (
    "RAY_AUTH_TOKEN",
    "DEFUSE_SERVE_TOKEN",
    "POSTGRES_PASSWORD",
    "S3_ACCESS_KEY_ID",
    "S3_SECRET_ACCESS_KEY",
    "LABEL_STUDIO_PASSWORD",
    "LABEL_STUDIO_USER_TOKEN",  # Label Studio takes at most 40 characters
    "LABEL_STUDIO_SECRET_KEY",
)


def write_env(path: Path) -> None:
    """Write `path`, readable by its owner alone. Raises FileExistsError rather than replace secrets that are in use."""
    lines = ["LABEL_STUDIO_USERNAME=admin@example.org"]
    lines += [f"{name}={secrets.token_hex(20)}" for name in RANDOM]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        write_env(ENV_FILE)
    except FileExistsError:
        sys.exit(f"{ENV_FILE} is already there; delete it first to make new secrets")
    print(f"wrote {ENV_FILE}")
