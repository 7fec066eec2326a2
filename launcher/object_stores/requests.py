"""Requests to stores: bounded attempts, and what it means that the last one failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

from launcher.printable import error_line, printable_line

_T = TypeVar("_T")

_NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
)
"""Errors of clients that find no complete credentials, which no further attempt changes."""

FailureKind = Literal["package", "url", "denied", "missing", "exists", "unanswered"]
"""Why a request failed: a package is missing, the URL has no file system, the store denied access,
it has no such object, it has one already, or every attempt failed for a passing reason."""


class RequestError(Exception):
    """A request to a store failed; callers turn it into an error that says what to do.

    Args:
        kind: Why it failed.
        reason: The reason in the words of the store or of fsspec, on one line.
    """

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def attempt(request: Callable[[], _T], attempts: int, *, longest_pause: float = 8.0) -> _T:
    """Return the result of a request, which is repeated if it fails for a passing reason.

    Args:
        request: The request.
        attempts: Largest number of attempts.
        longest_pause: Longest time between two attempts, in seconds; the first is 0.5 s, and each
            is twice as long as the one before.

    Raises:
        RequestError: The store denied access, has no such object, or no attempt succeeded.
    """
    reason = ""
    for number in range(attempts):
        if number:
            time.sleep(min(0.25 * 2**number, longest_pause))
        try:
            return request()
        except RequestError:
            raise
        except Exception as error:  # noqa: BLE001  # each file system has errors of its own
            status = status_of(error)
            reason = printable_line(error_line(first_cause(error)))
            if kind := _final_kind(error, status):
                raise RequestError(kind, _final_reason(kind, status, reason)) from None
    raise RequestError("unanswered", reason)


def _final_kind(error: Exception, status: int | None) -> FailureKind | None:
    """Return why a request failed for good; None if another attempt may succeed."""
    if isinstance(error, FileExistsError):
        return "exists"
    names = {type(error).__name__, type(first_cause(error)).__name__}
    is_denied = isinstance(error, PermissionError) or bool(names & _NO_CREDENTIALS)
    if status in (401, 403) or (status is None and is_denied):
        return "denied"
    is_missing = isinstance(error, FileNotFoundError) and error.__cause__ is None
    return "missing" if status in (404, 410) or (status is None and is_missing) else None


def _final_reason(kind: FailureKind, status: int | None, reason: str) -> str:
    if kind == "missing":
        return str(status or "not found")
    return str(status or reason)


def first_cause(error: BaseException) -> BaseException:
    """Return the exception from which an error was raised in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error or of what caused it; None if it has none."""
    current: BaseException | None = error
    while current is not None:
        response = getattr(current, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = getattr(current, "status", metadata.get("HTTPStatusCode"))
        if status is None:
            status = getattr(current, "code", None)
        if isinstance(status, int):
            return status
        current = current.__cause__
    return None
