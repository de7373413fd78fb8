"""The connection to a Label Studio server: the requests that Defuse makes, and their failures as one-line errors.

The SDK repeats requests after lost connections and overload where that is safe: reads, updates and deletions. What
creates something is never repeated here: it may have taken effect although its reply was lost, so the caller looks at
the server before it tries again (see project.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import re
from collections.abc import Generator, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from defuse_core.errors import DefuseError, InputError, ServiceError
from defuse_core.formatting import escape_control_characters, proxy_remedy
from defuse_core.optional_packages import expect_packages
from services.labeling.records import ANNOTATION, Project, ProjectSettings, Task, TaskImport
from services.settings import checked_address, fits_a_header, is_label_studio_url, proxy_for

CLIENT = ("Label Studio's client", "label-studio-sdk", "httpx")
try:
    import httpx
    from label_studio_sdk import base_client
    from label_studio_sdk.core.api_error import ApiError
    from label_studio_sdk.core.parse_error import ParsingError
except ModuleNotFoundError:
    expect_packages(*CLIENT)
    raise

REPEAT: Any = {"max_retries": 2}  # options of requests that have the same effect twice as once
ONCE: Any = {"max_retries": 0}
# Without these names the server counts the tasks and answers of each project in eight ways, and sends it whole.
PROJECT_FIELDS = ",".join(("id", *(field.name for field in dataclasses.fields(ProjectSettings))))
TASK_FIELDS = "id,meta,overlap,is_labeled,annotations,completed_by,result,was_cancelled,created_at,updated_at"
PAGE_SIZE = 250  # tasks
TIMEOUT_S = 60.0
# A reply of httpx refers to itself, and Python counts objects, not bytes: without a collection, bodies pile up.
PAGES_PER_COLLECTION = 4
TOKEN_PROBLEMS = {
    401: "rejects the token (401); set LABEL_STUDIO_API_KEY to one that it shows under Account & Settings",
    403: "forbids this request to the token's account (403); use an administrator's token",
}


class PageError(InputError):
    """In Label Studio's place something else sent a page: a proxy, a login, or the wrong server."""


class RejectedRequestError(ServiceError):
    """Label Studio found the request invalid (400)."""


class LabelStudioClient:
    """A Label Studio server. Every method raises ServiceError or InputError, in one line that says what to do."""

    def __init__(self, address: str, token: str, *, public_address: str | None = None) -> None:
        """`public_address` is the one that annotators open, if it is another than `address`."""
        expect_packages(*CLIENT)
        self.address = checked_address(address)
        self.public_address = checked_address(public_address or self.address, "LABEL_STUDIO_HOST")
        logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs a line per request
        if not fits_a_header(token):
            raise InputError(
                "LABEL_STUDIO_API_KEY: expected one word; copy the token again from Account & Settings"
            )
        with _environment_errors():
            http = httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)
        with translated_errors(self.address):
            # LabelStudio, which adds to it what is not used here, takes over a second to import
            self._sdk: Any = base_client.LabelStudioBase(
                base_url=self.address, api_key=token, timeout=TIMEOUT_S, max_retries=0, httpx_client=http
            )
        # without the slash the token would be sent to the path above a prefix
        if tokens := self._sdk._client_wrapper._tokens_client:
            tokens._base_url = f"{self.address}/"
            self._sdk._client_wrapper.httpx_client.httpx_client.auth = RenewedToken(tokens)

    def check_access(self, *, to_create: bool = False) -> None:
        """Request the account of the token: the cheapest request that needs the right address and a valid token.

        With `to_create`, raises InputError for an account of no organisation: nothing can be added to its projects.
        """
        if self.organization() is None and to_create:
            raise InputError(
                f"the account of LABEL_STUDIO_API_KEY works in no organisation of {self.address}: it was removed from "
                "its own; use a token of an administrator"
            )

    def organization(self) -> int | None:
        """Return the id of the organisation that the token's account works in, the only one whose projects it sees."""
        with translated_errors(self.address):
            found: int | None = self._sdk.users.whoami(request_options=REPEAT).active_organization
            return found

    def labeling_url(self, project: int) -> str:
        """Return the address that opens the queue of the project: one task after the other."""
        return f"{self.public_address}/projects/{project}/data?labeling=1"

    def task_url(self, project: int, task: int) -> str:
        return f"{self.public_address}/projects/{project}/data?task={task}"

    def invitation(self) -> str:
        """Return the address at which people sign up for an account on this server."""
        with translated_errors(self.address):
            invited = self._sdk.organizations.invites.get_invite_link(request_options=REPEAT)
            return f"{self.public_address}{invited.invite_url}"

    def create_project(self, settings: ProjectSettings) -> Project:
        """Create a project. After a lost reply it may exist nonetheless."""
        with translated_errors(self.address):
            return _project(self._sdk.projects.create(**dataclasses.asdict(settings), request_options=ONCE))

    def project(self, number: int) -> Project | None:
        with translated_errors(self.address):
            try:
                options = REPEAT | {"additional_query_parameters": {"include": PROJECT_FIELDS}}
                return _project(self._sdk.projects.get(id=number, request_options=options))
            except ApiError as error:
                if error.status_code == 404 and is_json(error.body):
                    return None
                raise

    def find_projects(self, mark: str) -> list[Project]:
        """Return the projects whose description contains `mark`, oldest first."""
        with translated_errors(self.address):
            page = self._sdk.projects.list(page_size=100, include=PROJECT_FIELDS, request_options=REPEAT)
            rows = list(page.items or ())
            with missing_allowed():  # projects were deleted meanwhile
                while page.response.next:
                    page = page.next_page()
                    rows += page.items or ()
            found = [_project(row) for row in rows if mark in (row.description or "")]
        return sorted(found, key=lambda project: project.id)

    def update_project(self, number: int, **settings: Any) -> None:
        """Change some ProjectSettings of a project."""
        with translated_errors(self.address):
            self._sdk.projects.update(id=number, **settings, request_options=REPEAT)

    def import_tasks(self, project: int, tasks: Sequence[TaskImport]) -> None:
        """Add tasks, all or none. After a lost reply they may exist nonetheless."""
        with translated_errors(self.address):
            self._sdk.projects.import_tasks(id=project, request=list(tasks), request_options=ONCE)

    def tasks(self, project: int, with_data: bool = False) -> Iterator[Task]:
        """Yield all tasks with all annotations, page by page; with_data adds the data that they show."""
        include, page = (TASK_FIELDS + ",data" if with_data else TASK_FIELDS), 1
        # the first page shows how long pages are: the server may have a limit (TASK_API_PAGE_SIZE_MAX)
        size, total = yield from self._page(project, include, page)
        seen = found = size
        while found == size > 0 and seen != total:
            page += 1
            if page % PAGES_PER_COLLECTION == 0:
                gc.collect()
            found, total = yield from self._page(project, include, page)
            seen += found

    def _page(self, project: int, include: str, page: int) -> Generator[Task, None, tuple[int, int | None]]:
        """Yield the tasks of one page, and return their number and that of all tasks, or None where it is unknown.

        No reference to the page remains.
        """
        with translated_errors(self.address):
            try:
                reply = self._sdk.tasks.list(
                    project=project,
                    page=page,
                    page_size=PAGE_SIZE,
                    fields="all",
                    include=include,
                    resolve_uri=False,
                    request_options=REPEAT,
                )
            except ApiError as error:
                if error.status_code == 404 and page > 1 and self.project(project) is not None:
                    return 0, None  # the page before was the last
                raise
            items, total = reply.items or (), getattr(reply.response, "total", None)
        for item in items:
            with translated_errors(self.address):
                task = _task(item)
            yield task
        return len(items), total

    def delete_task(self, number: int) -> None:
        """Delete a task; one that does not exist any more is no error."""
        with translated_errors(self.address), missing_allowed():
            self._sdk.tasks.delete(id=str(number), request_options=REPEAT)

    def delete_annotation(self, number: int) -> None:
        """Delete an annotation; one that does not exist any more is no error."""
        with translated_errors(self.address), missing_allowed():
            self._sdk.annotations.delete(id=number, request_options=REPEAT)

    def set_overlap(self, task: int, overlap: int, labeled: bool) -> None:
        """Set how many annotators get the task, and whether it leaves the queue now. Safe to repeat."""
        options = REPEAT | {"additional_body_parameters": {"overlap": overlap, "is_labeled": labeled}}
        with translated_errors(self.address), missing_allowed():
            self._sdk.tasks.update(id=str(task), request_options=options)

    def user_names(self) -> dict[int, str]:
        """Return each user's first and last name, or else the e-mail address, by user id.

        Control characters that a user typed are escaped, since terminals and logs show the names.
        """
        with translated_errors(self.address):
            users = self._sdk.users.list(request_options=REPEAT)
        names = {
            user.id: f"{user.first_name or ''} {user.last_name or ''}".strip() or str(user.email)
            for user in users
        }
        return {number: escape_control_characters(name) for number, name in names.items()}


class RenewedToken(httpx.Auth):
    """Renews the access token, and repeats the request, once where the server rejects it.

    A personal access token is exchanged for access tokens that are valid for five minutes. The SDK renews one when it
    has expired by this machine's clock, which may be late.
    """

    def __init__(self, tokens: Any) -> None:
        """`tokens` are those of the SDK's client."""
        self.tokens = tokens

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        response = yield request
        if request.url.path.endswith("/api/token/refresh/"):
            if "json" not in response.headers.get("Content-Type", ""):  # as which the SDK reads any reply
                raise ApiError(headers=dict(response.headers), status_code=response.status_code, body="")
        elif response.status_code == 401 and not self.tokens._use_legacy_token:
            self.tokens._access_token = None
            request.headers["Authorization"] = f"Bearer {self.tokens.api_key}"
            yield request


def _project(found: Any) -> Project:
    settings = ProjectSettings(
        title=str(found.title or ""),
        description=str(found.description or ""),
        label_config=str(found.label_config or ""),
        expert_instruction=str(found.expert_instruction or ""),
        show_instruction=bool(found.show_instruction),
        show_skip_button=bool(found.show_skip_button),
        maximum_annotations=int(found.maximum_annotations or 0),
        sampling=str(found.sampling or ""),
        show_collab_predictions=bool(found.show_collab_predictions),
        model_version=str(found.model_version or ""),
    )
    return Project(int(found.id), settings)


def _task(found: Any) -> Task:
    meta = found.meta if isinstance(found.meta, dict) else {}
    key, digest = (
        value if isinstance(value := meta.get(name), str) else None for name in ("sample_key", "digest")
    )
    return Task(
        id=int(found.id),
        key=key,
        digest=digest,
        overlap=int(found.overlap or 0),
        labeled=bool(found.is_labeled),
        annotations=tuple(
            ANNOTATION.validate_python(one if isinstance(one, dict) else one.model_dump())
            for one in found.annotations or ()
        ),
        data=found.data,
    )


@contextlib.contextmanager
def translated_errors(address: str) -> Iterator[None]:
    """Raise failures of a request in one line; the SDK's own errors hold whole pages, so they are not chained."""
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InputError(f"LABEL_STUDIO_URL: {address} is not a usable address") from error
    except (httpx.ConnectError, httpx.ProxyError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise InputError(
                f"Label Studio at {address}: its certificate is not trusted; set SSL_CERT_FILE to that of your CA"
            ) from None
        raise _unreachable(address) from None
    except httpx.TimeoutException:
        raise ServiceError(
            f"Label Studio at {address} is too slow to answer; run again, nothing is lost"
        ) from None
    except httpx.HTTPError:
        raise ServiceError(
            f"Label Studio at {address} cut the connection; run again, nothing is lost"
        ) from None
    except ApiError as error:
        raise _status_error(address, error) from None
    except (ParsingError, ValueError, TypeError, AttributeError, KeyError):
        raise ServiceError(
            f"{address} sent a reply that Label Studio 1.23 does not send; check LABEL_STUDIO_URL"
        ) from None


@contextlib.contextmanager
def _environment_errors() -> Iterator[None]:
    """Raise InputError for variables that httpx cannot use. It reads all of them, whatever the address."""
    try:
        yield
    except ImportError:
        raise InputError(
            "ALL_PROXY, HTTP_PROXY or HTTPS_PROXY names a SOCKS proxy: `pip install 'httpx[socks]'`, or unset it"
        ) from None
    except OSError as error:
        raise InputError(
            f"SSL_CERT_FILE: expected a file of certificates that can be read ({error.strerror})"
        ) from None
    except (httpx.InvalidURL, ValueError):  # its text can hold a proxy's password
        raise InputError(
            "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: expected an address such as http://proxy:3128; NO_PROXY: expected "
            "names and addresses, IPv6 ones without [] and /"
        ) from None


@contextlib.contextmanager
def missing_allowed() -> Iterator[None]:
    """Ignore that a task does not exist: someone deleted it in the meantime."""
    try:
        yield
    except ApiError as error:
        if error.status_code != 404:
            raise


def _unreachable(address: str) -> ServiceError:
    """Return the error of a server that cannot be reached, which names the proxy that the request went through."""
    remedy = "`defuse label-studio up` starts it; then run again"
    if is_label_studio_url(address):
        remedy = "start it or correct LABEL_STUDIO_URL, then run again"
    if proxy_for(address) is not None:
        remedy = f"{proxy_remedy(address)}; else start it"
    return ServiceError(f"Label Studio at {address} cannot be reached; {remedy}")


def _status_error(address: str, error: ApiError) -> DefuseError:
    status, body = error.status_code or 0, error.body
    if 200 <= status < 300 and isinstance(body, str) and body.lstrip().startswith(("{", "[")):
        return ServiceError(
            f"Label Studio at {address} sent only part of a reply; run again, nothing is lost"
        )
    if status < 500 and status != 429 and (300 <= status < 400 or not is_json(body)):
        return _page_error(address, status, (error.headers or {}).get("location", ""))
    if status in TOKEN_PROBLEMS:
        return InputError(f"Label Studio at {address} {TOKEN_PROBLEMS[status]}")
    if status == 429:
        problem = "is limiting requests (429); wait a minute and run again"
    elif status >= 500 and not is_json(body) and proxy_for(address) is not None:
        return _unreachable(address)
    elif status >= 500:
        problem = f"failed ({status}); see its log, then run again, nothing is lost"
    else:
        problem = f"did not accept the request ({status}): {_detail(body)}"
    kind = RejectedRequestError if status == 400 else ServiceError
    return kind(f"Label Studio at {address} {problem}")


def _page_error(address: str, status: int, location: str) -> InputError:
    """Return the error of a web page; `location` is where it redirects to."""
    if status == 413:
        return InputError(
            f"{address} is behind a proxy that refuses a request as too large (413); raise its limit (nginx: "
            "client_max_body_size)"
        )
    problem = f"answered with a web page ({status}), not as Label Studio does; correct LABEL_STUDIO_URL"
    if 300 <= status < 400:
        at = re.match("(https?://)(?:[^/?#]*@)?([^/?#]+)", location)  # a password in it is not shown
        elsewhere = f"to {at[1]}{at[2]}" if at else "elsewhere"
        problem = f"redirects {elsewhere} ({status}); set LABEL_STUDIO_URL to the final address"
    host = urlsplit(address).hostname
    login = "if a login sends that, let it pass requests with a token to /api"
    proxy = f"; if the environment's proxy does, add {host} to NO_PROXY" if proxy_for(address) else ""
    return PageError(f"{address} {problem}; {login}{proxy}")


def is_json(body: Any) -> bool:
    return isinstance(body, (dict, list)) or body is None or hasattr(body, "model_dump")


def _detail(body: Any) -> str:
    plain = body.model_dump() if hasattr(body, "model_dump") else body
    if isinstance(plain, dict):
        plain = plain.get("validation_errors") or plain.get("detail") or plain
    return json.dumps(plain, default=str)[:300]
