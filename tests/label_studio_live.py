"""One real Label Studio for each process of tests, started when the first test asks for it, and its accounts."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import secrets
import shutil
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from defuse_core.artifacts import Gallery
from defuse_core.codec import encode
from defuse_core.config import RunFile
from defuse_core.errors import DefuseError
from defuse_core.runs import Run
from defuse_core.store import FolderStore, Store
from services.labeling import local_server
from services.labeling.client import LabelStudioClient
from services.labeling.local_server import (
    Installation,
    LocalServer,
    _environment,
    install,
    start,
    stop,
)
from services.labeling.records import choice_result
from services.labeling.simulate import AnnotatorAccount
from services.settings import Environment, read_environment
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.conftest import MakeOnce

DATABASE = "label_studio.sqlite3"
# A fifth of the server's work is to look for garbage, and a password takes half a second to hash a million times.
LESS_WORK = """\
import gc
from django.contrib.auth.hashers import PBKDF2PasswordHasher
gc.set_threshold(50_000)
PBKDF2PasswordHasher.iterations = 1
"""
numbers = itertools.count(1)


@functools.cache
def live_home() -> Installation:
    """Return the installed server with empty data of its own."""
    try:
        home = Installation(
            install(read_environment().cache).env.parents[1], Path(tempfile.mkdtemp(prefix="label-studio-"))
        )
    except DefuseError as error:
        pytest.skip(f"no Label Studio server: {error}")
    atexit.register(shutil.rmtree, home.folder, ignore_errors=True)
    return home


@functools.cache
def live_server() -> LocalServer:
    """Return the running server; it ends with this process."""
    home = live_home()
    (home.folder / "sitecustomize.py").write_text(LESS_WORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            local_server,
            "_environment",
            lambda *given: _environment(*given) | {"PYTHONPATH": str(home.folder)},
        )
        server = start(home, free_port(), home.read_server())
    atexit.register(stop, server)
    return server


def server_of_process(make_once: MakeOnce) -> LocalServer:
    """Return the running server of this process. Only the first process of a test run waits for an empty database.

    They do not share one: while Label Studio 1.23 deletes a project, no signal reaches its other requests, and an
    account that is made meanwhile gets no token.
    """

    def make(folder: Path) -> None:
        server = live_server()
        folder.mkdir()
        copy_database(live_home().data, folder)
        Installation(folder, folder).write_server(server)

    made = make_once("label-studio", make)
    home = live_home()
    if not home.data.exists():
        home.data.mkdir(mode=0o700)
        copy_database(made, home.data)
        shutil.copy(made / "server.json", home.folder)
    return live_server()


def copy_database(source: Path, target: Path) -> None:
    """Copy Label Studio's database from one folder to another, also while a server uses it."""
    with (
        contextlib.closing(sqlite3.connect(source / DATABASE)) as old,
        contextlib.closing(sqlite3.connect(target / DATABASE)) as new,
    ):
        old.backup(new)


def write_into_cache(cache: Path) -> None:
    """Write the running server into a user's cache, where `defuse` finds the local one."""
    home = Installation(cache)
    home.folder.mkdir(parents=True, exist_ok=True)
    home.write_server(live_server())


@functools.cache
def annotator_accounts(count: int = 5) -> tuple[AnnotatorAccount, ...]:
    """Return accounts that signed up through the invitation link. The same ones for all tests."""
    server = live_server()
    invitation = invitation_to(server)
    return tuple(sign_up(server.address, invitation, f"person{n}@example.org") for n in range(1, count + 1))


def sign_up(address: str, invitation: str, email: str) -> AnnotatorAccount:
    """Create an account through the invitation link and its form, as people do."""
    return AnnotatorAccount(address, email, secrets.token_urlsafe(12)).enter(invitation)


def change(account: AnnotatorAccount, annotation: int, choice: str) -> None:
    """Let an annotator give another answer for the image of an annotation."""
    result = {"result": [choice_result("label", "image", choice)]}
    account.http.patch(f"/api/annotations/{annotation}/", json=result).raise_for_status()


def invitation_to(server: LocalServer) -> str:
    return LabelStudioClient(server.address, server.token).invitation()


def settings_for(server: LocalServer, address: str | None = None) -> Environment:
    url = address or server.address
    return replace(read_environment(), label_studio_url=url, label_studio_api_key=server.token)


def digits_gallery(labels: tuple[int, ...] = (8, 3, 0, 1), images: int = 3, size: int = 16) -> Gallery:
    """Return S scenarios of R real digits each; the classifier answers 3 for the first two and the right digit else."""
    data = load_digits()
    pixels = np.stack([data.images[np.flatnonzero(data.target == label)[:images]] for label in labels]) / 16
    pictures = [
        np.asarray(Image.fromarray((picture * 255).astype(np.uint8)).resize((size, size)), np.float32) / 255
        for picture in pixels.reshape(-1, 8, 8)
    ]
    shown = np.stack(pictures).reshape(len(labels), images, 1, size, size).astype(np.float32)
    predicted = np.tile(np.array([[3, 3, *labels[2:]]]).T[: len(labels)], (1, images)).astype(np.int64)
    codes = np.zeros((len(labels), images, 2), np.float32)
    return Gallery(shown, codes, predicted, tuple(str(n) for n in range(10)))


def photographs_gallery(images: int = 3) -> Gallery:
    """Return one scenario of R parts of a photograph, 224 x 224 in colour."""
    photograph = load_sample_image("china.jpg").transpose(2, 0, 1)  # (3, 427, 640)
    parts = [photograph[:, 200:424, 40 * part : 40 * part + 224] for part in range(images)]
    digits = digits_gallery(labels=(8,), images=images)
    return replace(digits, images=np.stack(parts)[None].astype(np.float32) / 255)


def review_run(store: Path | Store, gallery: Gallery, **review: object) -> Run:
    """Return a run that has reached its review, under a name of its own."""
    section = {
        "annotators": "label-studio",
        "accept": "share",
        "answers_per_task": 3,
        "stop_early": False,
        "images": 3,
        **review,
    }
    spec = RunFile.model_validate(
        {"data": {"name": "digits", "image_size": 16, "channels": 1}, "review": section}
    )
    run = Run.start(FolderStore(store) if isinstance(store, Path) else store, f"run{next(numbers)}", spec)
    run.store.write("gallery.safetensors", encode(gallery))
    return run
