"""URLs of files and objects: which text is one, and the file system of fsspec that reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.object_stores.requests import RequestError
from launcher.printable import printable_line, shortened

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOCAL = ("file://", "local://")
_HTTP = ("http://", "https://")
_S3 = ("s3://", "s3a://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of gpu-launcher that installs what a protocol needs."""

_CREDENTIALS = re.compile(r"(?<=://)[^/@]*@")


def is_url(location: Path | str) -> bool:
    """Return whether a location is a URL, be it of a local file."""
    return isinstance(location, str) and _URL.match(location) is not None


def is_remote(location: Path | str) -> bool:
    """Return whether a location is the URL of a remote file."""
    return isinstance(location, str) and is_url(location) and not location.startswith(_LOCAL)


def shown_url(url: str) -> str:
    """Return a URL for a message, without its query and its password, which may be secrets."""
    return printable_line(shortened(_CREDENTIALS.sub("", url.partition("?")[0]), 300))


def extra_of(url: str) -> str:
    """Return the extra of gpu-launcher that installs what a URL needs."""
    return _EXTRAS.get(url.partition("://")[0].lower(), "remote")


def open_file_system(
    url: str, options: Mapping[str, Any], timeout_seconds: float
) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path of the URL in it.

    fsspec itself returns a new file system in each process, because connections do not survive a
    fork.

    Args:
        url: The URL.
        options: Options of the file system.
        timeout_seconds: Time without any data after which a request fails, over HTTP and with S3.

    Raises:
        RequestError: A package is missing ("package"), or there is no such file system ("url").
    """
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url, **_options(url, options, timeout_seconds))
    except ImportError as error:
        raise RequestError("package", printable_line(str(error))) from None
    except ValueError as error:
        raise RequestError("url", printable_line(str(error))) from None
    return system, path


def _options(url: str, given: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return the options of a URL's file system, with the time after which a request fails.

    Raises:
        ImportError: aiohttp is not installed.
    """
    options = dict(given)
    if url.startswith(_HTTP) and "client_kwargs" not in options:
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        options["client_kwargs"] = {"timeout": timeout}
    if url.startswith(_S3):
        # One attempt of botocore: s3fs repeats it, and `attempt` repeats that.
        limits = {"connect_timeout": seconds, "read_timeout": seconds}
        config = limits | {"retries": {"max_attempts": 0}}
        options["config_kwargs"] = config | options.get("config_kwargs", {})
    return options
