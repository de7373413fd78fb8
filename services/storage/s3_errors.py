"""Errors of S3 in one line each, with what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from botocore import exceptions as aws

from defuse_core.errors import CredentialsError, StoreError, without_credentials

BROKEN = (  # what a body that is read can raise
    aws.ResponseStreamingError,
    aws.IncompleteReadError,
    aws.FlexibleChecksumError,
    aws.ReadTimeoutError,
)
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
DENIED = {
    "403",
    "AccessDenied",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "Unauthorized",
}
NO_ANSWER = (
    aws.HTTPClientError,
    aws.EndpointConnectionError,
    aws.ConnectionError,
    aws.ResponseStreamingError,
)


@contextlib.contextmanager
def translated_errors(where: str, endpoint: str | None) -> Iterator[None]:
    """Raise botocore's errors as FileNotFoundError for a missing key, as StoreError in one line for all else."""
    server = without_credentials(endpoint or "AWS")
    try:
        yield
    except aws.ClientError as error:
        raise _translated(error, where, server) from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
        raise CredentialsError(f"{where}: no complete AWS credentials found; set {CREDENTIALS}") from error
    except aws.CredentialRetrievalError as error:  # such as a metadata server that does not answer now
        raise StoreError(f"{where}: no complete AWS credentials found; set {CREDENTIALS}") from error
    except aws.ProfileNotFound as error:
        raise CredentialsError(f"{where}: {error}; check AWS_PROFILE") from error
    except NO_ANSWER as error:
        raise StoreError(
            f"{where}: no answer from {server} ({type(error).__name__}); check AWS_ENDPOINT_URL "
            "and the network, then run again to continue"
        ) from error
    except aws.BotoCoreError as error:
        raise StoreError(f"{where}: {without_credentials(str(error), endpoint)}") from error


def code_of(error: aws.ClientError) -> str:
    """Return the server's error code: a name such as NoSuchKey, or the HTTP status where it sent no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: aws.ClientError) -> int:
    """Return the HTTP status, 0 where unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _translated(error: aws.ClientError, where: str, server: str) -> Exception:
    code = code_of(error)
    if code == "NoSuchBucket":
        return StoreError(f"{where}: {server} has no such bucket; create it, or check --store")
    if code in {"NoSuchKey", "404", "NotFound"}:
        return FileNotFoundError(where)
    if code in DENIED or status_of(error) == 403:
        return StoreError(
            f"{where}: {server} refused the credentials ({code}); check {CREDENTIALS} and their rights"
        )
    if code in {"PermanentRedirect", "301", "AuthorizationHeaderMalformed"}:
        return StoreError(f"{where}: the bucket is in another region; set AWS_DEFAULT_REGION to it")
    message = error.response.get("Error", {}).get("Message", "")
    return StoreError(f"{where}: {server} answered {code} {message}; run again to continue")
