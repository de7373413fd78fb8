"""One real Label Studio for the whole test session, started when the first test asks for it, and its accounts."""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from defuse_core.artifacts import Gallery
from defuse_core.codec import encode
from defuse_core.config import RunFile
from defuse_core.errors import DefuseError
from defuse_core.runs import Run
from defuse_core.store import FolderStore, Store
from services.labeling.client import LabelStudioClient
from services.labeling.local_server import Installation, LocalServer, install, start, stop
from services.labeling.simulate import AnnotatorAccount
from services.settings import Settings, read_settings
from tests.ports import free_port

numbers = itertools.count(1)


@functools.cache
def live_home() -> Installation:
    """Return the installed server with empty data of its own."""
    try:
        home = Installation(
            install(read_settings().cache).env.parents[1], Path(tempfile.mkdtemp(prefix="label-studio-"))
        )
    except DefuseError as error:
        pytest.skip(f"no Label Studio server: {error}")
    atexit.register(shutil.rmtree, home.folder, ignore_errors=True)
    return home


@functools.cache
def pictures_address() -> str:
    """Return the only loopback address at which the server reads a bucket; a test may serve one there."""
    return f"http://127.0.0.1:{free_port()}"


@functools.cache
def live_server() -> LocalServer:
    """Return the running server; it ends with this process."""
    home = live_home()
    server = start(home, free_port(), None, LABEL_STUDIO_S3_ENDPOINT=pictures_address())
    atexit.register(lambda: stop(home.read_server() or server))
    return server


def restart(server: LocalServer) -> None:
    """Stop the server and start it again on its data and port."""
    stop(live_home().read_server() or server)
    start(live_home(), server.port, server, LABEL_STUDIO_S3_ENDPOINT=pictures_address())


def write_into_cache(cache: Path) -> None:
    """Write the running server into a user's cache, where `defuse` finds the local one. It may have been restarted."""
    home = Installation(cache)
    home.folder.mkdir(parents=True, exist_ok=True)
    home.write_server(live_home().read_server() or live_server())


@functools.cache
def annotator_accounts(count: int = 5) -> tuple[AnnotatorAccount, ...]:
    """Return accounts that signed up through the invitation link. The same ones for all tests."""
    server = live_server()
    invitation = invitation_to(server)
    return tuple(
        AnnotatorAccount.sign_up(server.address, invitation, f"person{n}@example.org")
        for n in range(1, count + 1)
    )


def invitation_to(server: LocalServer) -> str:
    return LabelStudioClient(server.address, server.token).invitation()


def settings_for(server: LocalServer, address: str | None = None) -> Settings:
    url = address or server.address
    return replace(read_settings(), label_studio_url=url, label_studio_api_key=server.token)


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
