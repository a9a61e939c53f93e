"""Small files in an object store: written whole, listed, found missing, deleted, as on the local disk."""

from __future__ import annotations

import pytest

from onetrans import storage


@pytest.fixture(scope="module")
def folder(object_store):
    return f"{object_store.create_bucket('files')}/some/folder"


def test_a_file_is_written_read_listed_and_deleted(object_store, folder):
    file = storage.join(folder, "a", "x.json")
    assert not storage.exists(folder)
    assert storage.list_files(folder) == []
    with pytest.raises(FileNotFoundError):
        storage.read_json(file)
    storage.write_json(file, {"x": 1})
    storage.write_json(file, {"x": 2})
    assert storage.read_json(file) == {"x": 2}
    assert storage.exists(folder)
    assert storage.list_files(folder) == [file]
    storage.delete_file(file)
    storage.delete_file(file)
    storage.delete_tree(folder)
    assert object_store.keys(folder) == []


def test_a_file_of_several_parts_is_seen_when_it_is_whole(object_store, folder):
    file = storage.join(folder, "large.bin")
    storage.write_bytes(file, b"old")
    with storage.writing(file) as stream:
        for number in range(3):
            stream.write(bytes([number]) * (8 << 20))
            assert storage.read_bytes(file) == b"old"
    assert storage.read_bytes(file) == b"".join(bytes([number]) * (8 << 20) for number in range(3))
