"""Local paths are taken letter by letter; an address is not; what Spark and Iceberg would misread is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.sources import open_source
from jobs.spark import _quoted
from onetrans import storage
from onetrans.errors import BadConfigError
from onetrans.lake import Lake
from onetrans.schema import load_schema
from onetrans.settings import LakeSettings, SourceSettings

NAMES = ["plain", "My Projects é", "100%", "a%20b", "c#", "why?", "a*b", "[x]"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_local_file_is_where_its_path_says(tmp_path: Path, name: str, scheme: str) -> None:
    folder = f"{scheme}{tmp_path}/{name}"
    storage.write_json(storage.join(folder, "a b.json"), {"x": 1})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (file,) = storage.list_files(folder, ".json")
    assert file == f"file://{tmp_path}/{name}/a b.json"
    assert storage.read_json(file) == {"x": 1}
    assert storage.local_path(file).is_file()
    storage.delete_tree(folder)
    assert not os.listdir(tmp_path)


def test_an_address_of_a_local_path_has_its_letters_encoded(tmp_path: Path) -> None:
    assert storage.address(f"{tmp_path}/é #1") == f"file://{tmp_path}/%C3%A9%20%231"
    assert storage.address("s3://bucket/x/") == "s3://bucket/x"


@pytest.mark.parametrize("name", ["c#", "why?", "a*b", "[x]", "{y}"])
def test_a_folder_that_spark_or_iceberg_misread_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadConfigError, match=f"lake.warehouse is the folder {tmp_path}/.*/lake, whose name has"):
        Lake(LakeSettings(warehouse=str(tmp_path / name / "lake")))
    kuairand = SourceSettings(kind="kuairand", path=str(tmp_path / name))
    with pytest.raises(BadConfigError, match=f"source.path is the folder {tmp_path}/"):
        open_source(kuairand, load_schema(kuairand))


def test_a_blank_in_an_option_of_the_jvm_does_not_cut_it() -> None:
    assert _quoted("-Xss4m") == "-Xss4m"
    assert _quoted("-XX:SharedArchiveFile=/My Projects/x.jsa") == '"-XX:SharedArchiveFile=/My Projects/x.jsa"'
    assert _quoted('-Da="b c"') == r'"-Da=\"b c\""'
