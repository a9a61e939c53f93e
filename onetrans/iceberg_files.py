"""PyIceberg's own files in an object store, opened as all others are: its catalog is told this class by name."""

from __future__ import annotations

from pyarrow.fs import FileSystem
from pyiceberg.io.pyarrow import PyArrowFileIO

from onetrans import storage


class StoreFiles(PyArrowFileIO):
    """Reads and writes through :func:`onetrans.storage.open_filesystem`."""

    def _initialize_fs(self, scheme: str, netloc: str | None = None) -> FileSystem:
        return storage.open_filesystem(f"{scheme}://{netloc or ''}")[0]
