"""A lake in S3 or in what speaks its protocol, through obstore (a binding of Rust's object_store)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from millpond.store.errors import InvalidInput, StorageFailed
from millpond.store.objects import PARALLEL_REQUESTS, Buffer, Entry, Storage, StreamWriter, is_hidden
from millpond.store.s3_uploads import abort_uploads

if TYPE_CHECKING:
    from obstore.store import S3Store

T = TypeVar("T")
PART_BYTES, LEAST_PART_BYTES = 8 << 20, 5 << 20
"""Size of one part of a multipart upload, and the least that S3 takes."""
READ_THREADS = 3
RETRY_SECONDS = 180.0
COALESCE_BYTES = 1 << 20
"""Ranges closer than this are read with one request."""

_NAMES = {  # s3fs's name to obstore's
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "endpoint_url": "endpoint",
    "anon": "skip_signature",
    "requester_pays": "request_payer",
}
_OWN = ("region", "virtual_hosted_style_request", "allow_http")


class S3Storage(Storage):
    """Objects under `s3://bucket/prefix`.

    Options, beside the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
    AWS_ENDPOINT_URL, AWS_PROFILE, ...) and the files in ~/.aws, as s3fs names them: `key`, `secret`, `token`,
    `anon`, `profile`, `endpoint_url`, `requester_pays`, `client_kwargs` (`endpoint_url`, `region_name`); and as
    obstore does: `region`, `virtual_hosted_style_request`, `allow_http`; and `retry_timeout_s` (180), for which failed
    requests are tried again: server errors, lost connections, throttling.

    Large objects are written as multipart uploads, which appear when they are completed. One that is never
    completed leaves parts that no listing shows, until `sweep` aborts it.
    """

    def __init__(self, store: S3Store, bucket: str, root: str, options: Mapping[str, Any]) -> None:
        self._store = store
        self._bucket = bucket
        self._root = root
        self.options = dict(options)
        self._retry_s = float(self.options.get("retry_timeout_s", RETRY_SECONDS))
        self.url = f"s3://{bucket}/{root}".rstrip("/")

    @classmethod
    def open(cls, rest: str, options: Mapping[str, Any]) -> S3Storage:
        """`rest` is the URL after its scheme."""
        bucket, _, root = rest.partition("/")
        if not bucket or ".." in root.split("/"):
            raise InvalidInput(f"'s3://{rest}' names no bucket or holds '..'; write s3://bucket/prefix")
        return cls(_open_store(bucket, options), bucket, root.strip("/"), options)

    @property
    def volume(self) -> str:  # noqa: D102
        return f"s3://{self._bucket} {self._store.config.get('endpoint', '')}"

    def _key(self, path: str) -> str:
        return f"{self._root}/{path}".strip("/")

    def __truediv__(self, path: str) -> S3Storage:
        return S3Storage(self._store, self._bucket, self._key(path), self.options)

    @property
    def parent(self) -> S3Storage:  # noqa: D102
        return S3Storage(self._store, self._bucket, self._root.rpartition("/")[0], self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Storage.open, (f"{self._bucket}/{self._root}", self.options)

    def sweep(self, prefix: str, before: float) -> None:
        """Abort the uploads that killed writers left anywhere below the storage, if `prefix` is its root.

        Raises:
            StorageFailed: the store refuses.
        """
        if not prefix and not self.options.get("anon"):
            profile = self.options.get("profile") or os.environ.get("AWS_PROFILE")
            abort_uploads(self._bucket, f"{self._root}/".lstrip("/"), before, self._store.config, profile)

    def get(self, path: str) -> bytes:  # noqa: D102
        with self._named_errors(path):
            return self._store.get(self._key(path)).bytes().to_bytes()

    def get_range(self, path: str, start: int, length: int) -> Buffer:  # noqa: D102
        if not length:
            return b""
        try:
            with self._named_errors(path):
                return self._store.get_range(self._key(path), start=start, length=length)
        except StorageFailed:  # S3 calls a range behind the end an error
            if self.head(path).size <= start:
                return b""
            raise

    def get_tail(self, path: str, length: int) -> Buffer:  # noqa: D102
        with self._named_errors(path):
            return self._store.get(self._key(path), options={"range": {"suffix": length}}).bytes()

    def get_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> Sequence[Buffer]:  # noqa: D102
        with self._named_errors(path):
            return list(
                self._store.get_ranges(self._key(path), starts=starts, lengths=lengths, coalesce=COALESCE_BYTES)
            )

    def read_into(self, path: str, start: int, target: memoryview) -> int:
        """As for any storage; of a long range several pieces are under way at once, and none is kept."""
        if len(target) <= PART_BYTES:
            return super().read_into(path, start, target)

        def read(begin: int) -> int:
            into = target[begin : begin + PART_BYTES]
            piece = self.get_range(path, start + begin, len(into))
            into[: len(piece)] = memoryview(piece)
            return len(piece)

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return sum(pool.map(read, range(0, len(target), PART_BYTES)))

    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:  # noqa: D102
        self._again(path, lambda: self._store.put(self._key(path), data, use_multipart=False))

    def create(self, path: str, data: bytes) -> bool:  # noqa: D102
        from obstore.exceptions import AlreadyExistsError

        try:
            self._again(path, lambda: self._store.put(self._key(path), data, mode="create"))
        except AlreadyExistsError:
            # an earlier attempt whose reply was lost may have made it: then it is ours
            with suppress(FileNotFoundError):
                return bool(data) and self.get(path) == data
            return False
        return True

    def stream_writer(self, path: str, memory: int = 64 << 20) -> StreamWriter:
        """As for any storage; needs two parts of 5 MiB, the least that S3 takes, and uses more of 8 MiB."""
        return _MultipartWriter(self, path, self._store, self._key(path), memory)

    def list(self, prefix: str = "") -> Iterator[Entry]:  # noqa: D102
        base = len(f"{self._root}/") if self._root else 0
        with self._named_errors(prefix):
            for batch in self._store.list(self._key(prefix) or None, chunk_size=1000):
                for meta in batch:
                    path = meta["path"][base:]
                    if not is_hidden(path):
                        yield Entry(path, meta["size"], meta["last_modified"].timestamp())

    def folders(self, prefix: str = "") -> Sequence[str]:  # noqa: D102
        listing = self._again(prefix, lambda: self._store.list_with_delimiter(self._key(prefix) or None))
        found = listing["common_prefixes"]
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def head(self, path: str) -> Entry:  # noqa: D102
        with self._named_errors(path):
            meta = self._store.head(self._key(path))
        return Entry(path, meta["size"], meta["last_modified"].timestamp())

    def delete(self, paths: str | Sequence[str]) -> None:  # noqa: D102
        keys = [self._key(path) for path in ([paths] if isinstance(paths, str) else paths)]
        from obstore.exceptions import NotFoundError

        if keys:
            with suppress(NotFoundError, FileNotFoundError):
                self._again(keys[0], lambda: self._store.delete(keys if len(keys) > 1 else keys[0]))

    def delete_tree(self, prefix: str) -> None:  # noqa: D102
        self.delete([entry.path for entry in self.list(prefix)])

    def copy(self, source: str, target: str) -> None:  # noqa: D102
        self._again(source, lambda: self._store.copy(self._key(source), self._key(target)))

    def _again(self, path: str, request: Callable[[], T]) -> T:
        """What `request` returns, repeated while connections break.

        object_store does that itself only for requests that HTTP calls safe; all of ours may be repeated.
        """
        from obstore.exceptions import GenericError

        end, pause = time.monotonic() + self._retry_s, 0.1
        while True:
            with self._named_errors(path):
                try:
                    return request()
                except GenericError as error:
                    if "error sending request" not in str(error) or time.monotonic() > end:
                        raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    @contextmanager
    def _named_errors(self, path: str) -> Iterator[None]:
        with s3_errors(f"{self.url}/{path}", self._bucket):
            yield


@contextmanager
def s3_errors(what: str, bucket: str) -> Iterator[None]:
    """Turns obstore's errors into ours."""
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        NotFoundError,
        PermissionDeniedError,
        UnauthenticatedError,
    )

    try:
        yield
    except (FileNotFoundError, NotFoundError) as error:
        if "NoSuchBucket" in str(error):
            raise StorageFailed(f"{what}: there is no bucket {bucket!r}; create it or check the endpoint") from None
        raise FileNotFoundError(f"{what} is missing") from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        if "RequestTimeTooSkewed" in str(error):
            raise StorageFailed(
                f"{what}: the store refuses requests of this host, whose clock is wrong by more than a quarter of an hour; "
                "set it (chrony or another NTP client)"
            ) from error
        raise StorageFailed(
            f"{what}: the store refuses these credentials ({_reason(error)}); renew them or ask for access"
        ) from error
    except (BaseError, OSError) as error:
        if isinstance(error, (StorageFailed, AlreadyExistsError)):
            raise
        raise StorageFailed(f"{what}: the store failed ({_reason(error)}); check it and try again") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split("Debug source")[0].split())
    return text if len(text) < 300 else f"{text[:300]}..."


class _MultipartWriter(StreamWriter):
    """One PUT for a small object, parts uploaded behind the writer for a large one."""

    def __init__(self, storage: S3Storage, path: str, store: S3Store, key: str, memory: int) -> None:
        import obstore

        part = PART_BYTES if memory >= 3 * PART_BYTES else LEAST_PART_BYTES
        parallel = min(max(memory // part - 1, 1), PARALLEL_REQUESTS)
        self._errors: Callable[[], AbstractContextManager[None]] = lambda: storage._named_errors(path)
        self._file: Any = obstore.open_writer(store, key, buffer_size=part, max_concurrency=parallel)

    def write(self, data: Buffer) -> None:
        with self._errors():
            self._file.write(bytes(data))  # which obstore keeps until it is sent

    def finish(self) -> None:
        with self._errors():
            self._file.close()
        self._file = None

    def abandon(self) -> None:
        self._file = None  # never completed, so nothing appears


def _open_store(bucket: str, options: Mapping[str, Any]) -> S3Store:
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise InvalidInput("a lake in S3 needs obstore; install it with: pip install 'millpond[s3]'") from error
    given = dict(options)
    client = dict(given.pop("client_kwargs", {}))
    given |= {"region": client.pop("region_name")} if "region_name" in client else {}
    given |= {"endpoint_url": client.pop("endpoint_url")} if "endpoint_url" in client else {}
    profile = given.pop("profile", None) or os.environ.get("AWS_PROFILE")
    retry_timeout = float(given.pop("retry_timeout_s", RETRY_SECONDS))
    unknown = [*client, *(name for name in given if name not in _NAMES and name not in _OWN)]
    if unknown:
        raise InvalidInput(
            f"storage option {unknown[0]!r} is not known; S3 takes {', '.join((*_NAMES, *_OWN, 'profile', 'client_kwargs'))}"
        )
    config = {_NAMES.get(name, name): value for name, value in given.items() if value is not None}
    allow_http = config.pop("allow_http", None)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        config.setdefault("endpoint", endpoint)
    provider = None
    if "access_key_id" not in config and not config.get("skip_signature"):
        provider = _profile_credentials(profile, config)
    if allow_http is None:  # a URL that says http:// means it
        allow_http = str(config.get("endpoint", "")).startswith("http://")
    return S3Store(
        bucket,
        config=config,  # type: ignore[arg-type]
        client_options={"allow_http": allow_http, "timeout": timedelta(seconds=60)},
        retry_config={
            "max_retries": 100_000,  # the time decides: a hundred refused connections take less than a minute
            "retry_timeout": timedelta(seconds=retry_timeout),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 3},
        },
        credential_provider=provider,
    )


def _profile_credentials(profile: str | None, config: dict[str, Any]) -> Callable[[], Any] | None:
    """Credentials from ~/.aws, as botocore finds and renews them (profiles, SSO, assumed roles, processes)."""
    files = [
        Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser(),
        Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser(),
    ]
    if profile is None and ("AWS_ACCESS_KEY_ID" in os.environ or not any(file.is_file() for file in files)):
        return None  # obstore reads the environment, web identities and instance metadata itself
    try:
        from botocore.exceptions import ProfileNotFound
        from botocore.session import Session
    except ImportError as error:
        raise InvalidInput("AWS profiles need botocore; install it with: pip install 'millpond[s3]'") from error
    session = Session(profile=profile)
    try:
        credentials = session.get_credentials()
        region = session.get_config_variable("region")
        endpoint = session.get_scoped_config().get("endpoint_url")
    except ProfileNotFound as error:
        raise InvalidInput(
            f"AWS profile {profile!r} is in neither {files[0]} nor {files[1]}; check its name"
        ) from error
    if credentials is None:
        raise InvalidInput(f"AWS profile {profile or 'default'!r} has no credentials; log in or give key and secret")
    if region:
        config.setdefault("region", region)
    if endpoint:
        config.setdefault("endpoint", endpoint)

    def frozen() -> dict[str, Any]:
        now = credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=5),
        }

    return frozen
