"""Storage of shards: folders, shared file systems, object stores, web servers.

Every read ends: with all of its bytes, or after a bounded number of attempts with a StorageError.
"""

import os
import re
from urllib.parse import unquote, urlsplit

from megatron_owl2.data.storage.base import Storage, StorageOptions
from megatron_owl2.data.storage.local import LocalStorage
from megatron_owl2.errors import StorageError, StorageMissing

__all__ = [
    "LocalStorage",
    "Storage",
    "StorageError",
    "StorageMissing",
    "StorageOptions",
    "open_storage",
]


def open_storage(location: str | os.PathLike, options: StorageOptions | None = None) -> Storage:
    """The storage of a folder's path, a file:// URL, or a URL that fsspec knows (http, s3, gs).

    Nothing is read yet. Raises StorageError for a URL whose client is unknown or not installed.
    Credentials and endpoints come from where the client looks for them (such as AWS_ENDPOINT_URL).
    """
    location, options = os.fspath(location), options or StorageOptions()
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location):
        return LocalStorage(location, options)
    if location.startswith("file://"):
        return LocalStorage(unquote(urlsplit(location).path), options)
    # The clients take seconds to import and come with an extra; folders need none of them.
    from megatron_owl2.data.storage.remote import RemoteStorage

    return RemoteStorage(location.rstrip("/"), options)
