"""What the client makes of single replies: which ones it accepts, and in which order it returns what they hold."""

from __future__ import annotations

import contextlib
import json
import time
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import pytest
from proxy import Proxy, Reply

from defuse_core.errors import InputError, ServiceError
from services.labeling.client import LabelStudioClient, PageError, translated_errors
from services.settings import checked_address

PAGE = Reply(404, "<!doctype html><html></html>", "text/html")
NOT_FOUND = Reply(404, '{"detail": "Not found."}')


def json_reply(body: object) -> Reply:
    return Reply(200, json.dumps(body))


@pytest.fixture
def client(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> LabelStudioClient:
    monkeypatch.setattr("label_studio_sdk.core.http_client._retry_timeout", lambda response, retries: 0)
    return LabelStudioClient(proxy.address, "0123456789abcdef")


def test_an_address_loses_its_spaces_and_the_slash_at_its_end():
    assert checked_address(" https://labels.example.org/prefix/ ") == "https://labels.example.org/prefix"


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http://[::1",
        "http://me@labels",
        "http://:secret@labels",
        "http://labels/#token=1",
        "http://labels/?token=1",
    ],
)
def test_an_address_without_a_host_or_with_more_than_one_is_refused(address):
    with pytest.raises(InputError, match="^LABEL_STUDIO_URL: expected a"):
        checked_address(address)


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError])
def test_a_connection_that_ends_in_any_way_is_one_line(error):
    with (
        pytest.raises(ServiceError, match="cut the connection; run again"),
        translated_errors("http://labels"),
    ):
        raise error("reset by peer")


@pytest.mark.parametrize("failure", [httpx.ConnectError, httpx.ProxyError])
def test_the_proxy_of_the_environment_is_named_where_a_server_cannot_be_reached(failure, monkeypatch):
    def message() -> str:
        with pytest.raises(ServiceError) as raised, translated_errors("http://labels:8080"):
            raise failure("refused")
        return str(raised.value)

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://labels:8080/")
    assert message().endswith("cannot be reached; start it or correct LABEL_STUDIO_URL, then run again")
    # of the local server, which `defuse label-studio simulate` uses whatever the variable says
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://elsewhere")
    assert message().endswith("cannot be reached; `defuse label-studio up` starts it; then run again")
    for name in ("http_proxy", "all_proxy"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://proxy.example.org:3128")
            told = "if the proxy of the environment does not reach it, add labels to NO_PROXY; else start it"
            assert told in message()
            patch.setenv("no_proxy", "labels")
            assert "PROXY" not in message()


def test_the_web_page_of_a_proxy_that_does_not_reach_the_server_is_no_failure_of_label_studio(
    proxy, client, monkeypatch
):
    proxy.answer(Reply(502, "<html>Bad Gateway</html>", "text/html"))
    with pytest.raises(ServiceError, match=r"failed \(502\); see its log"):
        client.check_access()
    monkeypatch.setenv("http_proxy", proxy.address)  # which answers in the server's place here, too
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ServiceError, match=r"cannot be reached; if the proxy of the environment"):
        client.check_access()


def test_what_the_server_did_not_accept_is_named_by_its_field_and_kept_short(proxy, client):
    refused = {"detail": "Validation error", "validation_errors": {"title": ["too long"]}}
    proxy.answer(Reply(400, json.dumps(refused)))
    with pytest.raises(ServiceError, match=r'\(400\): \{"title": \["too long"\]\}$'):
        client.check_access()
    proxy.answer(Reply(400, json.dumps({"detail": "x" * 5000})))
    with pytest.raises(ServiceError) as raised:
        client.check_access()
    assert len(str(raised.value)) < 400


def test_a_redirection_is_not_followed_with_the_token(proxy, client):
    for location, target in (
        ("/login", "elsewhere"),
        ("https://sso.example.org/?to=x", r"to https://sso\.ex\S+"),
        ("https://ana:secret@sso.example.org/", r"to https://sso\.ex\S+"),
    ):
        proxy.answer(Reply(302, "", location=location))
        with pytest.raises(
            InputError, match=rf"redirects {target} \(302\); .* final address; if a login sends that, let"
        ):
            client.check_access()
    assert len(proxy.seen) == 3


@pytest.mark.parametrize("delete", [LabelStudioClient.delete_task, LabelStudioClient.delete_annotation])
def test_only_a_deletion_of_what_is_gone_is_no_error(proxy, client, delete):
    proxy.answer(NOT_FOUND)
    delete(client, 5)
    proxy.answer(Reply(500))
    with pytest.raises(ServiceError, match=r"failed \(500\)"):
        delete(client, 5)


@pytest.mark.parametrize(
    "token", ["0123456789abcdef", jwt.encode({"exp": 2**33, "token_type": "refresh"}, "k" * 32)]
)
@pytest.mark.parametrize("status", [200, 301, 302, 401, 403, 404, 407, 502, 503])
def test_a_page_of_a_proxy_or_a_login_is_not_taken_for_a_word_of_label_studio(monkeypatch, token, status):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    page = httpx.Response(status, text="<html>", headers={"Location": "https://sso.example.org/login"})
    client = LabelStudioClient("http://labels", token)
    client._sdk._client_wrapper.httpx_client.httpx_client._transport = httpx.MockTransport(lambda _: page)
    monkeypatch.setattr("label_studio_sdk.core.http_client._retry_timeout", lambda response, retries: 0)
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    problem = f"answered with a web page ({status})"
    if status in (301, 302):
        problem = f"redirects to https://sso.example.org ({status})"
    with pytest.raises(ServiceError if status > 500 else PageError) as raised:
        client.check_access()
    assert ("cannot be reached" if status > 500 else problem) in str(raised.value)
    assert "API_KEY" not in str(raised.value) and "add labels to NO_PROXY" in str(raised.value)


@pytest.mark.parametrize("ends", [False, True])
def test_an_access_token_that_the_server_takes_no_more_is_renewed_once(ends):
    """As the last one of its five minutes, or by a clock that is ahead of this machine's."""
    made: list[str] = []

    def token(kind: str) -> str:
        return jwt.encode({"exp": time.time() + 3600, "token_type": kind, "n": len(made)}, "k" * 32)

    def serve(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/token/refresh/":
            made.append(token("access"))
            return httpx.Response(200, json={"access": made[-1]})
        valid = not ends and len(made) > 1 and request.headers["Authorization"] == f"Bearer {made[-1]}"
        account = {"id": 1, "email": "ana@example.org", "active_organization": 7}
        return httpx.Response(200, json=account) if valid else httpx.Response(401, json={"detail": "expired"})

    client = LabelStudioClient("http://labels", token("refresh"))
    client._sdk._client_wrapper.httpx_client.httpx_client._transport = httpx.MockTransport(serve)
    with pytest.raises(InputError, match="rejects the token") if ends else contextlib.nullcontext():
        assert client.organization() == 7
    assert len(made) == 2


def test_a_proxy_that_refuses_large_requests_is_not_taken_for_a_wrong_address(proxy, client):
    proxy.answer(Reply(413, "<html>413 Request Entity Too Large</html>", "text/html"))
    with pytest.raises(InputError, match=r"\(413\); raise its limit"):
        client.import_tasks(1, [{"data": {}}])


def test_a_project_is_gone_only_where_label_studio_says_so(proxy, client):
    proxy.answer(NOT_FOUND)
    assert client.project(5) is None
    proxy.answer(PAGE)  # of another application at this address
    with pytest.raises(InputError, match="web page"):
        client.project(5)


@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_page_ends_the_list_of_tasks_only_while_the_project_exists(
    proxy, client, monkeypatch, exists
):
    monkeypatch.setattr("services.labeling.client.PAGE_SIZE", 1)
    task = {"id": 7, "meta": {"sample_key": "s000-i00"}, "overlap": 2, "annotations": []}

    def rule(method: str, path: str) -> Reply:
        if "/api/tasks" in path and "page=1" in path.replace("page_size=1", ""):
            return json_reply({"tasks": [task], "total": 2})
        return json_reply({"id": 5}) if exists and "/api/projects/5" in path else NOT_FOUND

    proxy.rule = rule
    found = client.tasks(5)
    assert next(found).key == "s000-i00"
    if exists:
        assert list(found) == []
    else:
        with pytest.raises(ServiceError, match="Not found"):
            next(found)


@pytest.mark.parametrize("count", [3, 4])
def test_all_tasks_are_listed_where_the_server_cuts_its_pages(proxy, client, count):
    rows = [{"id": n, "meta": {}, "overlap": 2, "annotations": []} for n in range(count)]

    def rule(method: str, path: str) -> Reply:
        if "/api/tasks" not in path:
            return json_reply({"id": 5})
        page = int(parse_qs(urlsplit(path).query)["page"][0])
        shown = rows[2 * (page - 1) : 2 * page]
        return json_reply({"tasks": shown, "total": count}) if shown else NOT_FOUND

    proxy.rule = rule
    assert [task.id for task in client.tasks(5)] == list(range(count))
    assert len(proxy.seen) == 2  # no page is requested after the one with the last task


def test_the_oldest_project_with_a_mark_comes_first(proxy, client):
    rows = [{"id": n, "description": text} for n, text in ((9, "mark-1"), (4, "our mark-1"), (2, "mark-2"))]
    pages = iter([rows])
    proxy.rule = lambda method, path: json_reply({"count": 3, "results": next(pages, [])})
    assert [project.id for project in client.find_projects("mark-1")] == [4, 9]


def test_users_have_their_name_or_else_their_address(proxy, client):
    names = (("Ana", "Ng"), ("", "Ng"), ("Ana", ""), ("", ""))
    users = [
        {"id": n, "first_name": first, "last_name": last, "email": f"{n}@example.org"}
        for n, (first, last) in enumerate(names)
    ]
    proxy.answer(json_reply(users))
    assert client.user_names() == {0: "Ana Ng", 1: "Ng", 2: "Ana", 3: "3@example.org"}


def test_annotators_and_status_get_the_public_address():
    client = LabelStudioClient("http://127.0.0.1:1", "token", public_address="https://labels.example.org/")
    assert client.task_url(3, 4) == "https://labels.example.org/projects/3/data?task=4"
    assert client.labeling_url(3) == "https://labels.example.org/projects/3/data?labeling=1"
