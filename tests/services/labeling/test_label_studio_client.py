"""Whatever the server does wrong is one line that says what to do, and never contains the token."""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import jwt
import pytest
from label_studio_live import digits_gallery, review_run, settings_for
from label_studio_sdk.base_client import LabelStudioBase
from proxy import Reply

from defuse_core.errors import InputError, ServiceError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.labeling.annotators import LabelStudioAnnotators, connect
from services.labeling.client import LabelStudioClient
from services.settings import read_environment
from tests.ports import free_port

PAGE = "<!doctype html><html><body>Bad Gateway</body></html>"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("label_studio_sdk.core.http_client._retry_timeout", lambda response, retries: 0)
    monkeypatch.setattr("label_studio_sdk.core.http_client._retry_timeout_from_retries", lambda retries: 0)


@pytest.mark.parametrize(
    "reply, kind, words",
    [
        (Reply(401, '{"detail": "Invalid token."}'), InputError, "LABEL_STUDIO_API_KEY"),
        (Reply(403, '{"detail": "no"}'), InputError, "administrator"),
        (
            Reply(403, PAGE, "text/html"),
            InputError,
            "if a login sends that, let it pass requests with a token",
        ),
        (Reply(404, PAGE, "text/html"), InputError, "web page"),
        (Reply(404, '{"detail": "Not found."}'), ServiceError, "Not found"),
        (Reply(429, '{"detail": "slow down"}'), ServiceError, "wait a minute"),
        (Reply(500, PAGE, "text/html"), ServiceError, "see its log"),
        (Reply(502, PAGE, "text/html"), ServiceError, "failed (502)"),
        (Reply(200, PAGE, "text/html"), InputError, "web page (200)"),
        (Reply(200, '["nothing like a user"]'), ServiceError, "check LABEL_STUDIO_URL"),
        (Reply(200, '{"id": 1, "active_org'), ServiceError, "sent only part of a reply; run again"),
        (Reply(302, ""), InputError, "redirects"),
    ],
)
def test_each_failure_is_one_line_that_says_what_to_do(proxy, server, reply, kind, words):
    proxy.answer(reply)
    with pytest.raises(kind) as raised:
        LabelStudioClient(proxy.address, server.token).check_access()
    line = str(raised.value)
    assert words in line and proxy.address in line
    assert "\n" not in line and "html" not in line and server.token not in line and len(line) < 300
    assert str(pickle.loads(pickle.dumps(raised.value))) == line


def test_overload_is_asked_again_for_reads_and_never_for_writes(proxy, server):
    proxy.answer(Reply(503))
    with pytest.raises(ServiceError):
        LabelStudioClient(proxy.address, server.token).check_access()
    assert len(proxy.seen) == 3
    with pytest.raises(ServiceError):
        LabelStudioClient(proxy.address, server.token).import_tasks(1, [{"data": {}}])
    assert len(proxy.seen) == 4


def test_a_server_that_is_down_is_named(server, monkeypatch):
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("LABEL_STUDIO_URL", address)
    with pytest.raises(ServiceError, match=r"cannot be reached; start it"):
        LabelStudioClient(address, server.token).check_access()


def test_below_a_path_prefix_a_personal_access_token_is_sent_to_no_other_application(proxy):
    later = {"exp": time.time() + 3600}
    personal = jwt.encode({**later, "token_type": "refresh"}, "k" * 32)
    access = json.dumps({"access": jwt.encode({**later, "token_type": "access"}, "k" * 32)})
    account = json.dumps({"id": 1, "email": "ana@example.org"})
    proxy.rule = lambda method, path: Reply(200, access if path.endswith("/refresh/") else account)
    for token in ("0123456789abcdef", personal):
        LabelStudioClient(f"{proxy.address}/labels/", token).check_access()
    user = "GET /labels/api/current-user/whoami"
    assert proxy.seen == [user, "POST /labels/api/token/refresh/", user]


def test_a_certificate_that_is_not_trusted_is_named(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as https:
        https.socket = context.wrap_socket(https.socket, server_side=True)
        threading.Thread(target=https.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match="certificate is not trusted; set SSL_CERT_FILE"):
            LabelStudioClient(f"https://localhost:{https.server_port}", "0123456789abcdef").check_access()
        https.shutdown()


def test_a_server_that_is_slow_is_named(proxy, server, monkeypatch):
    monkeypatch.setattr("services.labeling.client.TIMEOUT_S", 0.5)
    proxy.rule = lambda method, path: 2.0
    with pytest.raises(ServiceError, match="too slow"):
        LabelStudioClient(proxy.address, server.token).check_access()


def test_a_cut_connection_is_named(proxy, server):
    proxy.cut("GET", "/", times=9)
    with pytest.raises(ServiceError, match="cut the connection"):
        LabelStudioClient(proxy.address, server.token).check_access()


@pytest.mark.parametrize(
    "address", ["labels.example.org", "ftp://labels", "http://me:pw@labels", "http://x/?token=1"]
)
def test_an_address_that_is_none_is_refused_without_repeating_it(address):
    with pytest.raises(InputError) as raised:
        LabelStudioClient(address, "token")
    assert "pw" not in str(raised.value) and "token=1" not in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (
            "ALL_PROXY",
            "socks5://127.0.0.1:9",
            r"names a SOCKS proxy: `pip install 'httpx\[socks\]'`, or unset it",
        ),
        ("all_proxy", "socks://127.0.0.1:9", "ALL_PROXY: expected an address such as http://proxy:3128"),
        (
            "HTTP_PROXY",
            "http://ana:sesame@p:80a",
            "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: expected an address",
        ),
        ("NO_PROXY", "localhost,fd00::/8", r"NO_PROXY: expected .*, IPv6 ones without \[\] and /"),
        ("NO_PROXY", "[::1]", "NO_PROXY: expected"),
        ("SSL_CERT_FILE", "{folder}/missing", r"^SSL_CERT_FILE: expected a file .* \(No such file"),
        ("SSL_CERT_FILE", "{folder}", r"^SSL_CERT_FILE: expected a file .* \(Is a directory\)$"),
        ("SSL_CERT_FILE", "{folder}/page", r"^SSL_CERT_FILE: expected a file .* no certificate"),
    ],
)
def test_a_variable_that_the_client_cannot_use_is_named(tmp_path, monkeypatch, variable, value, words):
    """Also where the address needs no proxy and no certificate."""
    (tmp_path / "page").write_text(PAGE)
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value.format(folder=tmp_path))
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(InputError, match=words) as refused:
        LabelStudioClient("http://127.0.0.1:1", "token")
    assert "sesame" not in str(refused.value)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ümlaut"])
def test_a_token_that_cannot_be_one_is_refused_without_repeating_it(token):
    with pytest.raises(InputError, match="LABEL_STUDIO_API_KEY") as raised:
        LabelStudioClient("http://127.0.0.1:1", token)
    assert not token or token not in str(raised.value)


def test_without_any_server_it_is_said_how_to_get_one(tmp_path):
    nothing = replace(read_environment(), label_studio_url=None, label_studio_api_key=None, cache=tmp_path)
    with pytest.raises(InputError, match="defuse label-studio up"):
        connect(nothing)
    with pytest.raises(InputError, match="LABEL_STUDIO_API_KEY is not"):
        connect(replace(nothing, label_studio_url="http://127.0.0.1:1"))


def test_the_token_is_in_no_log_no_repr_and_no_file_of_the_run(make_review, server, caplog):
    caplog.set_level(logging.DEBUG)
    review = make_review()
    review.annotators.push(review.gallery)
    review.annotators.status(review.gallery)
    shown = caplog.text + repr(review.annotators.client) + repr(settings_for(server)) + repr(server)
    assert "HTTP Request" not in caplog.text  # which would contain every address
    stored = b"".join(review.run.store.read(key) for key in review.run.store.list())
    assert server.token not in shown and server.token.encode() not in stored


def test_a_server_that_is_missing_is_said_before_anything_is_computed(tmp_path):
    gone = replace(
        read_environment(), label_studio_url=f"http://127.0.0.1:{free_port()}", label_studio_api_key="token"
    )
    run = review_run(tmp_path, digits_gallery())
    with pytest.raises(ServiceError, match="cannot be reached"):
        LabelStudioAnnotators(run, gone)
    LabelStudioAnnotators(Run(FolderStore(tmp_path), run.name, run.spec, until="draw"), gone)
    run.store.write("votes.safetensors", b"in already")
    LabelStudioAnnotators(run, gone)


def test_a_personal_access_token_does_as_well_as_a_legacy_one(server):
    headers = {"Authorization": f"Token {server.token}"}
    made = httpx.post(f"{server.address}/api/token/", headers=headers, json={}, timeout=60, trust_env=False)
    LabelStudioClient(server.address, made.json()["token"]).check_access()


@pytest.mark.parametrize(
    ("missing", "package"), [("label_studio_sdk", "label-studio-sdk"), ("httpx", "httpx")]
)
def test_without_the_client_library_it_is_said_what_to_install(missing, package, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "services.labeling.client")
    with pytest.raises(InputError, match=f"{package}.* .found none.; pip install '{package}"):
        importlib.import_module("services.labeling.client")


@pytest.mark.parametrize("release", ["2.0.23", "2.2.0", "2.2.0rc1", "3.0"])
def test_a_client_library_that_is_too_old_or_too_new_is_named_before_a_reply_cannot_be_read(
    release, monkeypatch
):
    monkeypatch.setattr("importlib.metadata.version", {"label-studio-sdk": release, "httpx": "0.28"}.get)
    with pytest.raises(InputError, match=rf"label-studio-sdk>=2.1,<2.2 \(found {release}\); pip install"):
        LabelStudioClient("http://127.0.0.1:1", "token")


def test_the_client_library_has_the_private_parts_that_are_set_there():
    wrapper = LabelStudioBase(base_url="http://127.0.0.1:1", api_key="token")._client_wrapper
    assert {"_base_url", "_access_token", "_use_legacy_token"} <= vars(wrapper._tokens_client).keys()
    assert isinstance(wrapper.httpx_client.httpx_client, httpx.Client)


def test_a_local_server_needs_no_client_library():
    code = "import sys; sys.modules['label_studio_sdk'] = None; import services.labeling.local_server"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("public", ["labels.example.org", "https://ana:secret@labels.example.org"])
def test_an_unusable_address_for_annotators_is_named_by_its_own_variable(public):
    with pytest.raises(InputError, match=r"^LABEL_STUDIO_HOST: expected a") as refused:
        LabelStudioClient("http://127.0.0.1:1", "token", public_address=public)
    assert "secret" not in str(refused.value)
