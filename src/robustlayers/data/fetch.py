"""Downloads, only when asked for: each file is checked against its SHA-256, then written whole, or not at all."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.files import write_bytes
from robustlayers.data import fashion, idx

__all__ = ["fetch"]

_SOURCES = {"fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"}
_LIMIT = 1 << 26  # bytes of one download, zipped or not; the largest file has 47 million
_TIMEOUT = 60  # seconds without a byte


def fetch(name: str, to: Path | None = None, *, source: str | None = None) -> Path:
    """Download the data set `name` (`fashion-mnist`: four files, 31 MB) into the folder `to`, and return that folder.

    `to` defaults to the user's cache, where `load` looks. Files that are there and whole are kept. `source` is another
    address (http, https or file) or a local folder that holds the files. What is checked is the SHA-256 of the unzipped
    content, so any honest copy will do.

    Raises `UserError` if the data set is unknown, the source cannot be reached, or a file is not what it should be.
    """
    if name not in _SOURCES:
        raise UserError(one_of("data set to fetch", name, _SOURCES))
    folder = Path(to) if to is not None else fashion.cache_folder(name)
    base = _address(source or _SOURCES[name])
    for file, digest in fashion.DIGESTS.items():
        path = folder / f"{file}.gz"
        if path.is_file() and _digest(path.read_bytes()) == digest:
            continue
        url = base + urllib.parse.quote(f"{file}.gz")
        content = _download(url)
        if _digest(content) != digest:
            raise UserError(f"{url}: not the file of {name}: the SHA-256 of its content differs; nothing was written")
        write_bytes(path, content)
    return folder


def _address(source: str) -> str:
    scheme = urllib.parse.urlsplit(source).scheme
    if scheme in ("http", "https", "file"):
        return source.rstrip("/") + "/"
    if "://" in source:
        raise UserError(f"source: {source!r}; allowed: an address with http, https or file, or a folder")
    return Path(source).resolve().as_uri() + "/"


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            content = answer.read(_LIMIT + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: cannot be downloaded ({reason}); nothing was written") from None
    if len(content) > _LIMIT:
        raise UserError(f"{url}: more than {_LIMIT} bytes; nothing was written")
    return content


def _digest(content: bytes) -> str | None:
    """Return the digest of gzipped bytes' content, or None if they are no whole gzip file of a sane size."""
    unzip = zlib.decompressobj(wbits=31)
    try:
        plain = unzip.decompress(content, _LIMIT)
    except zlib.error:
        return None
    return idx.content_digest(plain) if unzip.eof else None
