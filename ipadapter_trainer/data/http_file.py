"""A file by URL, read as a stream. A connection that breaks is resumed where it stopped."""

from __future__ import annotations

import io
import urllib.request
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError

from ..errors import DataError

_ATTEMPTS = 6
_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 20  # bytes that are skipped at once
# Other 4xx statuses are final.
RETRIES = urllib3.Retry(_ATTEMPTS - 1, backoff_factor=1, status_forcelist=[408, 425, 429, *range(500, 600)])


class HttpFile(io.RawIOBase):
    """The bytes of a URL. Raises OSError for a status such as 404, DataError when all attempts fail."""

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._pool = _pool(url)
        self._response: urllib3.BaseHTTPResponse | None = None
        self.read(0)  # connects

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; none at the end."""
        try:
            data = self._read(size)
        except MaxRetryError as error:
            raise DataError(
                f"{self._url}: {error.reason} ({_ATTEMPTS} attempts). Check the network, then run the same command "
                "again."
            ) from error
        self._position += len(data)
        return data

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()  # the pool does not hold a connection that is in use
        self._pool.clear()
        super().close()

    def _read(self, size: int) -> bytes:
        retries = RETRIES
        while True:
            try:
                if self._response is None:
                    self._response = self._connect(retries)
                return self._response.read1(size)
            except MaxRetryError:
                raise
            except HTTPError as error:
                self._response = None
                retries = retries.increment("GET", self._url, error=error)
                retries.sleep()

    def _connect(self, retries: urllib3.Retry) -> urllib3.BaseHTTPResponse:
        headers = {"User-Agent": "ip-adapter-kit"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        options = {"preload_content": False, "decode_content": False, "timeout": _TIMEOUT, "retries": retries}
        response = self._pool.request("GET", self._url, headers=headers, **options)
        if response.status >= 400:
            raise OSError(f"HTTP status {response.status} {response.reason}")
        if response.status != 206:  # the whole file
            before = self._position
            while before:
                data = response.read1(min(before, _BLOCK))
                if not data:
                    raise ProtocolError(f"it ends before byte {self._position:,}, where it was read to before")
                before -= len(data)
        return response


def _pool(url: str) -> urllib3.PoolManager:
    """A connection pool that respects the proxy settings of the environment."""
    address = urlsplit(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy is None or urllib.request.proxy_bypass(address.netloc):
        return urllib3.PoolManager()
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    login = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
    return urllib3.ProxyManager(proxy, proxy_headers=urllib3.make_headers(proxy_basic_auth=login or None))
