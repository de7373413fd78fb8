"""Errors of S3 in one line each, with what to do, and the watch for a server that gives no answer.

Of such a server there is one warning per outage and process, and a request to it ends after about a minute.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import urllib3.exceptions
from botocore import exceptions as aws

from defuse_core.errors import NoAnswerError, StoreError, StoreSettingsError
from defuse_core.formatting import one_line, proxy_remedy, without_credentials
from services.settings import proxy_for

log = logging.getLogger("defuse")
BROKEN = (  # what a body that is read can raise
    aws.ResponseStreamingError,
    aws.IncompleteReadError,
    aws.FlexibleChecksumError,
    aws.ReadTimeoutError,
)
CHECK_NETWORK = "check AWS_ENDPOINT_URL and the network, then run again to continue"
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
WRONG_URL = (
    "AWS_ENDPOINT_URL (or endpoint_url in AWS's configuration file): expected such as http://host:9000, with its "
    "scheme, and a host of letters, digits, dots and hyphens"
)
# S3 answers so to an expired token; to a HEAD, whose answer has no body, with the status alone
EXPIRED = {"400", "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
DENIED = EXPIRED | {"AccessDenied", "InvalidIdentityToken", "InvalidToken"}  # beside statuses 401 and 403
OTHER_REGION = {
    "301",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
}
REMEDIES = {  # errors that are no refusal of the credentials, although the status may be 403
    "413": (StoreSettingsError, "a proxy before the server refuses so large objects: raise its limit"),
    "InvalidBucketName": (StoreSettingsError, "check --store"),
    "InvalidObjectState": (StoreSettingsError, "the object is archived: restore it"),
    "InvalidRegionName": (StoreSettingsError, "set AWS_DEFAULT_REGION to a region of that server"),
    "QuotaExceeded": (StoreError, "free space there, then run again to continue"),
    "RequestTimeTooSkewed": (
        StoreSettingsError,
        "the clock of this machine is wrong: set it (in WSL with `sudo hwclock -s`)",
    ),
    "XMinioAdminBucketQuotaExceeded": (StoreError, "free space there, then run again to continue"),
    "XMinioStorageFull": (StoreError, "free space there, then run again to continue"),
}
CONFLICT = {409, 412}  # statuses where another program wrote first
# codes of a request that arrived altered: the next one may be accepted
OF_ONE_REQUEST = {"BadDigest", "IncompleteBody", "InvalidPart", "NoSuchUpload", "XAmzContentSHA256Mismatch"}
# answers of a server, or of a proxy before it, that is busy or fails for a while
PASSING = re.compile(
    "Thrott|RequestTimeout|TooManyRequests|(Bandwidth|Request)LimitExceeded|SlowDown|ServiceUnavailable|InternalError|"
    "PriorRequestNotComplete|IDPCommunicationError"
)
PASSING_STATUS = {408, 429, 500, 502, 503, 504, 509, *range(520, 525), 530}
NO_ANSWER = (aws.HTTPClientError, aws.ConnectionError)
UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")  # OpenSSL's words
UNREADABLE = (
    "No such file",
    "Is a directory",
    "Permission denied",
    "NO_CERTIFICATE_OR_CRL_FOUND",
)  # the CA's file
LOGIN_ERROR = getattr(aws, "LoginError", aws.SSOError)  # botocore 1.40 has no LoginError: that of `aws login`
NO_FILE = {  # a file or program of credentials that does not exist, or may not be read or run
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ENOEXEC,
}
NO_LISTING = "; AWS answers so for a missing object, too, unless s3:ListBucket is allowed on the whole bucket"
MESSAGE_LENGTH = 500  # characters of a server's message, which may name a user, an action and an object
SILENCE_S = 50.0  # longest time without an answer to one request, beside the pauses between its attempts
PAUSE_S, MAX_PAUSE_S = 0.05, 20.0  # between attempts, as botocore's
WARN_S = 5.0  # age of an unanswered request that is an outage: the next attempts mend shorter ones

_silent: set[str] = set()  # servers of which this process has warned
_lock = threading.Lock()


@contextlib.contextmanager
def translated_errors(
    where: str, endpoint: str | None, forget_client: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Raise botocore's errors as FileNotFoundError for a missing key, as StoreError in one line for all else.

    Calls `forget_client` where there are no credentials, or the server refuses them: a new client looks for them again.
    """
    try:
        yield
    except aws.ClientError as error:
        if _is_denied(error):
            forget_client()
        raise _translated(error, where, endpoint) from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
        forget_client()
        raise StoreSettingsError(f"{where}: no complete AWS credentials found; set {CREDENTIALS}") from error
    except aws.CredentialRetrievalError as error:  # such as a metadata server that does not answer now
        raise NoAnswerError(
            f"{where}: no complete AWS credentials found ({_reason(error, endpoint)}); check {CREDENTIALS}"
        ) from error
    except (aws.SSOError, aws.TokenRetrievalError, LOGIN_ERROR) as error:
        is_sso = isinstance(error, aws.SSOError | aws.TokenRetrievalError)
        command = "aws sso login" if is_sso else "aws login"
        remedy = "" if command in str(error) else f"; log in with `{command}`"
        raise StoreSettingsError(f"{where}: {_reason(error, endpoint)}{remedy}") from error
    except aws.ProfileNotFound as error:
        raise StoreSettingsError(f"{where}: {error}; check AWS_PROFILE") from error
    except NO_ANSWER as error:
        if "Invalid header value" in str(error):  # it quotes the key
            raise StoreSettingsError(
                f"{where}: AWS_ACCESS_KEY_ID or AWS_SESSION_TOKEN holds a line break or another sign that no HTTP "
                "header can hold; set it to the key alone"
            ) from None
        raise _without_answer(error, where, endpoint) from error
    except aws.BotoCoreError as error:
        kind = NoAnswerError if isinstance(error, BROKEN) else StoreError
        raise kind(f"{where}: {without_credentials(str(error), endpoint)}") from error
    except OSError as error:
        if error.filename is None:  # such as the FileNotFoundError of a missing key
            raise
        raise _without_file(error, where) from error
    except (EOFError, RuntimeError, ValueError) as error:
        raise _of_no_request(error, where, endpoint) from error


class _BrokenBody:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def read(self) -> bytes:
        raise aws.ResponseStreamingError(error=self.error) from self.error


def answer_with_body(get: Callable[..., dict[str, Any]], **at: str) -> dict[str, Any]:
    """Return get(**at), the answer that holds an object.

    botocore neither translates nor repeats the request where the server sends an error instead, as when it is busy, and
    the text of that breaks off or stalls. An answer is returned then whose body cannot be read, as of such an object.
    """
    try:
        return get(**at)
    except (urllib3.exceptions.ProtocolError, urllib3.exceptions.ReadTimeoutError) as error:
        return {"Body": _BrokenBody(error)}


def _reason(error: Exception | str, endpoint: str | None, limit: int = 200) -> str:
    """Return foreign text on one line without passwords of addresses, which are removed before it is cut."""
    return one_line(without_credentials(str(error), endpoint), limit).rstrip(".")


def _server(endpoint: str | None) -> str:
    return without_credentials(endpoint or "AWS")


def _has_words(error: Exception, words: tuple[str, ...]) -> bool:
    return isinstance(error, aws.SSLError) and any(word in str(error) for word in words)


def code_of(error: aws.ClientError) -> str:
    """Return the server's error code: a name such as NoSuchKey, or the HTTP status where it sent no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: aws.ClientError) -> int:
    """Return the HTTP status, 0 where unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_denied(error: aws.ClientError) -> bool:
    code = code_of(error)
    return code in DENIED or (status_of(error) in (401, 403) and code not in REMEDIES)


def _translated(error: aws.ClientError, where: str, endpoint: str | None) -> Exception:
    code, server = code_of(error), _server(endpoint)
    message = _reason(error.response.get("Error", {}).get("Message", ""), endpoint, MESSAGE_LENGTH)
    answer = ": ".join(filter(None, (code or str(status_of(error)), message)))
    if remedy := _endpoint_remedy(error):
        return StoreSettingsError(f"{where}: {server} answered {answer}; {remedy}{_proxy_hint(endpoint)}")
    if code == "NoSuchBucket":
        return StoreSettingsError(f"{where}: {server} has no such bucket; create it, or check --store")
    if code in {"NoSuchKey", "404", "NotFound"}:
        return FileNotFoundError(where)
    if _is_denied(error):
        # a job that starts again has a new token
        kind = StoreError if code in EXPIRED else StoreSettingsError
        hint = NO_LISTING if code == "403" else ""
        return kind(
            f"{where}: {server} refused the credentials ({answer}); check {CREDENTIALS}, their rights and expiry{hint}"
        )
    if code in OTHER_REGION:
        return StoreSettingsError(f"{where}: the bucket is in another region; set AWS_DEFAULT_REGION to it")
    kind, remedy = REMEDIES.get(code) or _general_remedy(error, endpoint)
    return kind(f"{where}: {server} answered {answer}; {remedy}")


def _general_remedy(error: aws.ClientError, endpoint: str | None) -> tuple[type[StoreError], str]:
    code, status, passes = code_of(error), status_of(error), _passes(error)
    if 400 <= status < 500 and status not in CONFLICT and code not in OF_ONE_REQUEST and not passes:
        return StoreSettingsError, "correct that: check --store, the bucket's settings and AWS_ENDPOINT_URL"
    # such as of a proxy, or of a page that botocore cannot read
    remedy = CHECK_NETWORK + _proxy_hint(endpoint) if code.isdecimal() else "run again to continue"
    return (NoAnswerError if passes else StoreError), remedy


def _passes(error: aws.ClientError) -> bool:
    return bool(PASSING.search(code_of(error))) or status_of(error) in PASSING_STATUS


def _endpoint_remedy(error: aws.ClientError) -> str | None:
    """Return how to correct AWS_ENDPOINT_URL, None where the answer is one that an S3 server gives."""
    code = code_of(error)
    # a store is opened by a listing; what is no answer to other requests can be a proxy's
    if not error.operation_name.startswith("List"):
        return None
    if code == "NoSuchKey":
        return "remove the bucket from AWS_ENDPOINT_URL"
    # S3 names each error
    if code.strip("0123456789") or not 200 <= status_of(error) < 500 or _passes(error):
        return None
    return (
        "that is no answer of S3: check the scheme of AWS_ENDPOINT_URL, and that its port is the one of the S3 "
        "server, not of its web page"
    )


def _proxy_hint(endpoint: str | None) -> str:
    address = endpoint or "https://amazonaws.com"
    return "" if proxy_for(address) is None else f"; {proxy_remedy(address)}"


def _without_file(error: OSError, where: str) -> StoreError:
    reason = f"{error.filename}: {error.strerror}"
    if error.errno in NO_FILE:
        return StoreSettingsError(
            f"{where}: no complete AWS credentials found ({reason}); check {CREDENTIALS}"
        )
    return StoreError(f"{where}: {reason}; run again to continue")  # such as too many open files


def _of_no_request(
    error: EOFError | RuntimeError | ValueError, where: str, endpoint: str | None
) -> StoreError:
    if isinstance(error, EOFError):
        return StoreSettingsError(
            f"{where}: the AWS profile asks for an MFA code, which nobody can type here; give the run temporary keys: "
            '`eval "$(aws configure export-credentials --profile NAME --format env)"`'
        )
    if isinstance(error, RecursionError):  # after each redirect botocore asks for the bucket's region
        return StoreSettingsError(
            f"{where}: {_server(endpoint)} redirects elsewhere; set AWS_ENDPOINT_URL to the final address"
            f"{_proxy_hint(endpoint)}"
        )
    return StoreError(  # of a credential_process that prints old keys, or no JSON
        f"{where}: {_reason(error, endpoint)}; if a program gives AWS credentials (credential_process), check it"
    )


def _without_answer(error: aws.BotoCoreError, where: str, endpoint: str | None) -> StoreError:
    server = _server(endpoint)
    if _has_words(error, UNREADABLE):
        return StoreSettingsError(
            f"{where}: AWS_CA_BUNDLE (or ca_bundle in AWS's configuration file) names no file of certificates that "
            f"can be read ({error.kwargs['error']}); correct it"
        )
    if _has_words(error, UNTRUSTED):
        return StoreSettingsError(
            f"{where}: the certificate of {server} is not trusted, or it speaks no TLS; set AWS_CA_BUNDLE to the "
            "file of your CA's certificate, or correct AWS_ENDPOINT_URL"
        )
    return NoAnswerError(
        f"{where}: no answer from {server} ({type(error).__name__}); {CHECK_NETWORK}{_proxy_hint(endpoint)}"
    )


class OutageTimer:
    """Times the requests of one client. botocore itself counts attempts only, of which each can take a timeout."""

    def __init__(self, client: Any, attempts: int, timeout_s: float) -> None:
        """`timeout_s` is the longest silence in one attempt, after which botocore ends it."""
        self.attempts = attempts
        self.server, self.timeout_s = without_credentials(client.meta.endpoint_url), timeout_s
        self.silence_s = max(SILENCE_S, 2 * timeout_s)  # at least two attempts
        client.meta.events.register("request-created.s3", self._on_attempt)
        client.meta.events.register_first("needs-retry.s3", self._on_result)

    def _on_attempt(self, request: Any, **_: Any) -> None:
        request.context["defuse_begun"] = time.monotonic()

    def _on_result(
        self, request_dict: Any, response: Any, caught_exception: Exception | None, attempts: int, **_: Any
    ) -> float | None:
        """Return the pause before the next attempt, None to leave it to botocore.

        Raises the attempt's error, which ends its request: one that no attempt mends, or after a long silence.
        """
        if caught_exception is not None and _has_words(caught_exception, UNTRUSTED + UNREADABLE):
            raise caught_exception
        if not isinstance(caught_exception, NO_ANSWER):
            self._report_end()
            status = 0 if response is None else response[0].status_code
            return self._pause_s(attempts) if status in PASSING_STATUS else None
        context, now = request_dict["context"], time.monotonic()
        # a slow line takes the rest of the time to send the body
        waited_s = min(now - context["defuse_begun"], self.timeout_s)
        context.setdefault("defuse_silent_since", now - waited_s)
        context["defuse_silent_s"] = context.get("defuse_silent_s", 0.0) + waited_s
        if context["defuse_silent_s"] >= self.silence_s:
            raise caught_exception
        if now - context["defuse_silent_since"] >= WARN_S:
            self._report()
        return self._pause_s(attempts)

    def _pause_s(self, attempts: int) -> float | None:
        """Return the pause before the next attempt, None after the last.

        botocore itself would end a request early: all requests of a client share a quota of some 35 further attempts,
        which only answers without an error refill.
        """
        if attempts >= self.attempts:
            return None
        return random.uniform(0, min(PAUSE_S * 2**attempts, MAX_PAUSE_S))

    def _report(self) -> None:
        with _lock:
            if self.server in _silent:
                return
            _silent.add(self.server)
        log.warning("the S3 server %s does not answer, trying again", self.server)

    def _report_end(self) -> None:
        with _lock:
            if self.server not in _silent:
                return
            _silent.remove(self.server)
        log.info("the S3 server %s answers again", self.server)
