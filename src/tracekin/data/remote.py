"""Shards that lie elsewhere: s3://, gs://, https:// through fsspec, which is imported at first use.

Credentials, endpoints and proxies are those of each store's own tools: the AWS variables and files, Google's default
credentials, ~/.netrc and HTTPS_PROXY; further settings are fsspec's (FSSPEC_S3_ANON=1, ~/.config/fsspec).

A connection that brings no byte for ``timeout`` seconds is ended, and so is a request that takes ``REQUEST_TIMEOUTS``
times as long altogether. gcsfs knows only the latter and repeats some requests within it; s3fs and aiohttp repeat none.
File systems without coroutines (memory://, file://, sftp://) have no limit.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from tracekin.config import UserError
from tracekin.data import faults
from tracekin.data.cache import ShardCache
from tracekin.data.faults import Fault, patiently

if TYPE_CHECKING:  # manifest.py reads its text from here
    from tracekin.data.manifest import Shard

T = TypeVar("T")

TIMEOUT = 30.0
REQUEST_TIMEOUTS = 4
CHUNK = 8 << 20
"""Bytes a request; a large shard is fetched with many, so that a lost connection costs little."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
LOGIN = re.compile("Credential|Profile|SSO|Token|RefreshError")
"""In the names of botocore's and google-auth's errors of the user's own settings."""
CREDENTIALS = {
    "s3": "Check AWS_PROFILE or the AWS keys; a public bucket needs FSSPEC_S3_ANON=1",
    "gcs": "Run `gcloud auth application-default login` or name a key file in GOOGLE_APPLICATION_CREDENTIALS",
    "http": "Put the host's credentials into ~/.netrc",
}

_stores: dict[tuple[int, str, float], Any] = {}
"""fsspec's file systems by process, protocol and timeout. A child keeps those of its parent, though it cannot use them:
finalised in the child, they would take the parent's connections from the event queue that both share.
"""


def is_remote(location: str) -> bool:
    """Whether a location is a URL rather than a path."""
    return "://" in location


def read_text(url: str) -> str:
    """A small UTF-8 file.

    Raises:
        UserError: it cannot be had, or a package that its protocol needs is missing; says what to do.
    """
    if re.match(r"[^:]+://[^/]*@|https?://[^?]*\?", url):  # not repeated in the message: it is secret
        raise UserError(
            "the manifest's address holds a login or a query: either would reach the logs, and the shards beside it do "
            "not share a query; give the plain address, and the host's credentials in ~/.netrc."
        )
    try:
        return b"".join(_whole(url)).decode()
    except UnicodeDecodeError:
        raise UserError(f"{url} is no UTF-8 text; give the address of a manifest.json.") from None
    except Fault as fault:
        if fault.reason == "missing":
            advice = "Check the address"
        elif fault.passing:
            advice = "Check that this machine reaches it (HTTPS_PROXY names a proxy), or try again later"
        else:
            advice = CREDENTIALS.get(EXTRAS.get(_protocol(url), ""), "Check the address and your permissions")
        raise UserError(f"cannot read {url}: {fault.detail}. {advice}.") from None


class RemoteShards:
    """The shards beside a remote manifest, through the node's cache. Picklable; connects at first use in each process.

    Errors that may pass are waited out here: the faults that come out are final.
    """

    def __init__(self, folder: str, cache: ShardCache, timeout: float = TIMEOUT) -> None:
        """``folder``: a URL; ``timeout``: seconds without a byte that end a connection."""
        self._folder, self._cache, self._timeout = folder.rstrip("/"), cache, timeout
        self._whole_only = False
        self._wrong: dict[str, Fault] = {}

    def read(self, shard: "Shard", offset: int, length: int) -> bytes:
        """Bytes ``[offset, offset + length)`` of a shard, by a request of their own.

        A server that answers with whole files is asked once; from then on the shard goes through the cache.

        Raises:
            Fault: missing, truncated, timeout or unreachable; checksum: the store's file is larger than the shard.
        """
        if self._whole_only:
            descriptor = self.open(shard)
            try:
                return os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        return self._named(shard, lambda: b"".join(self._pieces(shard, offset, offset + length)))

    def open(self, shard: "Shard") -> int:
        """A descriptor of the verified local copy, downloaded if need be; the caller closes it.

        Raises:
            Fault: as ``read`` and ``ShardCache.open``. What is not the shard that the manifest means is not fetched
                again by this process.
        """
        if (known := self._wrong.get(shard.file)) is not None:
            raise Fault(known.reason, known.detail)
        fetch = partial(self._download, shard)
        try:
            return self._named(shard, lambda: self._cache.open(shard.sha256, shard.bytes, fetch))
        except Fault as fault:
            if fault.reason in ("checksum", "truncated"):
                self._wrong[shard.file] = fault
            raise

    def cached(self, shard: "Shard") -> int | None:
        """As ``open`` if the cache has it, else None; asks no network."""
        return self._named(shard, lambda: self._cache.find(shard.sha256))

    def discard(self, shard: "Shard", descriptor: int | None = None) -> None:
        """Drop a cached copy that was damaged on disk; see ``ShardCache.discard``."""
        self._named(shard, lambda: self._cache.discard(shard.sha256, descriptor))

    def _download(self, shard: "Shard", file: BinaryIO) -> None:
        for piece in self._pieces(shard, 0, shard.bytes):
            file.write(piece)

    def _pieces(self, shard: "Shard", start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) in order."""
        while start < stop:
            end = min(start + CHUNK, stop)
            answer = _patient(partial(_request, f"{self._folder}/{shard.file}", start, end, self._timeout))
            if len(answer) == shard.bytes != end - start:  # the server knows no ranges
                self._whole_only = True
                yield answer[start:stop]
                return
            if len(answer) != end - start:
                detail = f"{len(answer)} bytes came where {end - start} were asked for"
                raise Fault("truncated" if len(answer) < end - start else "checksum", detail)
            yield answer
            start = end

    def _named(self, shard: "Shard", call: Callable[[], T]) -> T:
        try:
            return call()
        except Fault as fault:
            raise Fault(fault.reason, f"{self._folder}/{shard.file}: {fault.detail}") from fault


def _whole(url: str) -> Iterator[bytes]:
    """A file of unknown size. Faults that outlast all patience still say whether they are passing."""
    start = 0
    while True:
        try:
            answer = patiently(partial(_request, url, start, start + CHUNK, TIMEOUT), faults.PAUSES)
        except Fault as fault:
            if fault.reason == "truncated":  # nothing after what came already
                return
            raise
        yield answer
        if len(answer) != CHUNK:  # the end, or the whole from a server that knows no ranges
            return
        start += CHUNK


def _patient(call: Callable[[], T]) -> T:
    """``call()``; what outlasts all patience is final."""
    try:
        return patiently(call, faults.PAUSES)
    except Fault as fault:
        raise Fault(fault.reason, fault.detail) from fault


def _request(url: str, start: int, end: int, timeout: float) -> bytes:
    """The store's answer to one request for bytes [start, end) of a file; not always what was asked for.

    Raises:
        Fault: missing, truncated (it has no byte ``start``), timeout or unreachable.
        UserError: a package is missing, or the protocol is unknown.
    """
    store = _store(_protocol(url), timeout)
    path = store._strip_protocol(url)
    try:
        if not store.async_impl:
            answer = store.cat_file(path, start=start, end=end)
        else:
            from fsspec.asyn import sync

            limit = REQUEST_TIMEOUTS * timeout
            answer = sync(store.loop, store._cat_file, path, start=start, end=end, timeout=limit)
    # Each store has errors of its own, and few common ancestors.
    except Exception as error:
        raise _fault(error) from error
    return bytes(answer)


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def _store(protocol: str, timeout: float) -> Any:
    """This process's file system; fork carries over neither connections nor the thread that serves them."""
    key = (os.getpid(), protocol, timeout)
    if key not in _stores:
        import fsspec

        try:
            # Not fsspec's own cache of instances: what is set here is not for others.
            store = fsspec.filesystem(protocol, skip_instance_cache=True, **_options(protocol, timeout))
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            remedy = f'install it with: pip install "tracekin[{extra}]"' if extra else str(error)
            raise UserError(f"{protocol}:// needs a package that is missing; {remedy}.") from None
        except ValueError as error:
            raise UserError(f"cannot read {protocol}://: {error}; use s3://, gs:// or https://.") from None
        if EXTRAS.get(protocol) == "s3":
            store.retries = 1  # of s3fs itself, five by default
        _stores.setdefault(key, store)
    return _stores[key]


def _options(protocol: str, timeout: float) -> dict[str, Any]:
    """Time limits and no repetitions, as `patiently` repeats; beside what the user set through fsspec."""
    match EXTRAS.get(protocol):
        case "s3":
            limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
            return {"config_kwargs": limits | _users("config_kwargs", "s3", "s3a")}
        case "http":
            from aiohttp import ClientTimeout

            own = {
                "timeout": ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
                "trust_env": True,  # proxies and ~/.netrc
                "headers": {"Accept-Encoding": "identity"},  # ranges count the file's own bytes
            }
            return {"client_kwargs": own | _users("client_kwargs", "http", "https")}
    return {}


def _users(option: str, *protocols: str) -> dict[str, Any]:
    """What the user's settings of fsspec say, which arguments would replace as a whole."""
    from fsspec.config import conf

    return {key: value for name in protocols for key, value in conf.get(name, {}).get(option, {}).items()}


def _fault(error: Exception) -> Fault:
    """What a store's error means."""
    status, message = _described(error)
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError)):
        return Fault("missing", f"it is not there{message}")
    if status == 416:
        return Fault("truncated", f"it ends before the bytes asked for{message}")
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if status == 408 or any("Timeout" in kind for kind in kinds):
        return Fault("timeout", f"no answer in time{message}", passing=True)
    if status in (401, 403) or isinstance(error, PermissionError):
        return Fault("unreachable", f"no permission{message}")
    if any(LOGIN.search(kind) for kind in kinds):
        return Fault("unreachable", f"no valid credentials{message}")
    refused = status is not None and 400 <= status < 500 and status != 429
    return Fault("unreachable", f"{type(error).__name__}{message}", passing=not refused)


def _described(error: Exception) -> tuple[int | None, str]:
    """The HTTP status, and what else is known in one line that begins with ": " or is empty."""
    answer = getattr(error.__cause__ or error, "response", None)  # botocore's error, of which s3fs made another
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        message = answer.get("Error", {}).get("Message", "")
    else:
        status = getattr(error, "status", getattr(error, "code", None))  # aiohttp, gcsfs
        message = "" if status or isinstance(error, FileNotFoundError) else str(error)
    status = int(status) if str(status).isdigit() else None
    known = f"HTTP {status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else ""
    told = " ".join(str(message).split()).rstrip(".")[:200]
    parts = [part for part in (known, "" if known.endswith(told) else told) if part]
    return status, f": {', '.join(parts)}" if parts else ""
