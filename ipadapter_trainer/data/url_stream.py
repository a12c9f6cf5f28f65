"""A file by URL, read as a stream that survives broken connections."""

from __future__ import annotations

import io
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import Any

from ..errors import DataError

_RETRIES = 5
_PAUSE = 1.0  # seconds before the first of them, doubled each time
_TIMEOUT = 30.0  # seconds without a byte
_PERMANENT = range(400, 500)  # HTTP statuses that trying again does not change, but for these:
_BUSY = (408, 425, 429)


class UrlStream(io.RawIOBase):
    """The bytes of a URL, going on where a connection broke.

    A status that says that the file is not there raises urllib's HTTPError; a server that cannot be reached, DataError.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._position, self._length = 0, -1
        self._response: HTTPResponse | None = None
        self._again(self._connect)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; none at the end."""
        data = self._again(lambda: self._read(size))
        self._position += len(data)
        return data

    def readable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
        super().close()

    def _connect(self) -> None:
        request = urllib.request.Request(self._url, headers={"User-Agent": "ip-adapter-kit"})
        if self._position:
            request.add_header("Range", f"bytes={self._position}-")
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
        if response.status != 206:  # the whole file
            self._length = int(response.headers.get("Content-Length", -1))
            skip = self._position
            while skip:
                skip -= len(response.read(min(skip, 1 << 20)) or _closed(self._url))
        self._response = response

    def _read(self, size: int) -> bytes:
        if self._response is None:
            self._connect()
        assert self._response is not None
        data = self._response.read(None if size < 0 else size)
        if not data and size and self._position < self._length:
            _closed(self._url)
        return data

    def _again(self, action: Callable[[], Any]) -> Any:
        reason: Exception | None = None
        for attempt in range(_RETRIES + 1):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                return action()
            except urllib.error.HTTPError as error:
                if error.code in _PERMANENT and error.code not in _BUSY:
                    raise
                reason = error
            except (OSError, HTTPException) as error:
                reason = error
            self._response = None
        raise DataError(
            f"{self._url}: {reason} ({_RETRIES + 1} attempts). Check the network, then start the same command again."
        )


def _closed(url: str) -> bytes:
    raise ConnectionError(f"{url}: the connection was closed early")
