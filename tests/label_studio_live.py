"""One real Label Studio for the whole test session, and people on it. Started when the first test asks for it."""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import socket
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
from services.labeling.server import Home, LocalServer, install, start, stop
from services.labeling.simulate import Person, invite_link
from services.settings import Settings, read_settings

numbers = itertools.count(1)


@functools.cache
def live_home() -> Home:
    """Return the installed server with empty data of its own."""
    try:
        home = Home(
            install(read_settings().cache).env.parents[1], Path(tempfile.mkdtemp(prefix="label-studio-"))
        )
    except DefuseError as error:
        pytest.skip(f"no Label Studio server: {error}")
    atexit.register(shutil.rmtree, home.folder, ignore_errors=True)
    return home


@functools.cache
def live_server() -> LocalServer:
    """Return the running server; it ends with this process."""
    home = live_home()
    server = start(home, free_port(), None, SSRF_PROTECTION_ENABLED="false")
    atexit.register(lambda: stop(home.recorded() or server))
    return server


def restart(server: LocalServer) -> None:
    """Stop the server and start it again on its data and port."""
    stop(live_home().recorded() or server)
    start(live_home(), server.port, server, SSRF_PROTECTION_ENABLED="false")


def note_in(cache: Path) -> None:
    """Note the running server in a user's cache, where `defuse` finds the local one. It may have started again."""
    home = Home(cache)
    home.folder.mkdir(parents=True, exist_ok=True)
    home.record(live_home().recorded() or live_server())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@functools.cache
def people(count: int = 5) -> tuple[Person, ...]:
    """Return people who signed up through the invite link. The same ones for all tests."""
    server = live_server()
    invite = invite_link(server)
    return tuple(
        Person.sign_up(server.address, invite, f"person{n}@example.org") for n in range(1, count + 1)
    )


def settings_for(server: LocalServer, address: str | None = None) -> Settings:
    url = address or server.address
    return replace(read_settings(), label_studio_url=url, label_studio_api_key=server.token)


def digits_gallery(labels: tuple[int, ...] = (8, 3, 0, 1), images: int = 3, size: int = 16) -> Gallery:
    """Return S scenarios of R real digits each; the classifier says 3 for the first two and the right digit else."""
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
    """Return a run that has come to its review, under a name of its own."""
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
