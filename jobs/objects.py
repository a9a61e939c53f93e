"""Spark and S3: through s3a where Hadoop's module for it is on Spark's class path, else over copies on this machine.

PySpark brings Hadoop's client without ``hadoop-aws`` and without AWS' SDK.  Where a
deployment has put both beside it, Spark reads and writes S3 itself.  Where they
are missing, a local session (``local[N]``) reads copies that are fetched here, and
what it writes is put into the store before the manifest that makes it visible; a
cluster's executors share no disk with this process, so there a job stops and says
which files are missing.
"""

from __future__ import annotations

import functools
import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyspark
from py4j.protocol import Py4JError
from pyarrow import fs
from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from onetrans import storage
from onetrans.errors import BadConfigError, NotReadyError, PipelineError
from onetrans.settings import Settings

logger = logging.getLogger(__name__)

JARS: Mapping[str, tuple[str, ...]] = {
    "3.4.2": (
        "org.apache.hadoop:hadoop-aws:3.4.2",
        "software.amazon.awssdk:bundle:2.29.52",
        "software.amazon.s3.analyticsaccelerator:analyticsaccelerator-s3:1.2.1",
    ),
}
"""Version of Hadoop that a PySpark brings -> what s3a needs of exactly that version, as Maven names it.

PySpark 4.1 brings Hadoop 3.4.2; the other two are the versions that hadoop-aws 3.4.2 was built with.
"""

CLASSES = {
    "hadoop-aws": "org.apache.hadoop.fs.s3a.S3AFileSystem",
    "bundle": "software.amazon.awssdk.services.s3.S3Client",
    "analyticsaccelerator-s3": "software.amazon.s3.analyticsaccelerator.S3SeekableInputStreamFactory",
}
"""Artifact -> a class that it alone has."""

_AT_ONCE = 8


class StoreFailedError(PipelineError):
    """A copy to or from an object store is not whole; running the step again can help."""


def hadoop_version(spark: SparkSession) -> str:
    """Return the version of Hadoop that Spark brings."""
    return str(_java(spark).org.apache.hadoop.util.VersionInfo.getVersion())


def found_jars(spark: SparkSession) -> dict[str, str]:
    """Return, for each artifact that s3a needs and Spark can load, the name of its file."""
    jvm = _java(spark)
    found = {}
    for artifact, name in CLASSES.items():
        try:
            loaded = jvm.org.apache.spark.util.Utils.classForName(name, False, False)
        except Py4JError:
            continue
        source = loaded.getProtectionDomain().getCodeSource()
        found[artifact] = str(source.getLocation().getPath()).rsplit("/", 1)[-1] if source is not None else artifact
    return found


def installed(packages: str = "") -> tuple[str, dict[str, str]]:
    """Return what :func:`hadoop_version` and :func:`found_jars` would, by the names of PySpark's files, without Java.

    Args:
        packages: value of ``spark.jars.packages``, which Spark fetches when it starts.
    """
    names = [file.name for file in (Path(pyspark.__file__).parent / "jars").glob("*.jar")]
    hadoop = next((found[1] for name in names if (found := re.fullmatch(r"hadoop-client-api-(.+)\.jar", name))), "")
    names += ["{1}-{2}.jar".format(*name.strip().split(":")) for name in packages.split(",") if name.count(":") == 2]
    return hadoop, {artifact: name for name in names for artifact in CLASSES if re.match(rf"{artifact}-\d", name)}


def problems(hadoop: str, found: Mapping[str, str]) -> list[str]:
    """Say what keeps Spark from s3a: each artifact that is missing, or of another version; empty: nothing.

    Args:
        hadoop: version of Hadoop that Spark brings.
        found: artifact -> name of its file, of those that are there.
    """
    if hadoop not in JARS:
        needed = [f"org.apache.hadoop:hadoop-aws:{hadoop}", "and the AWS SDK it was built with"]
        return [] if {"hadoop-aws", "bundle"} <= set(found) else [f"{' '.join(needed)} must be on Spark's class path"]
    told = []
    for name in JARS[hadoop]:
        artifact, version = name.split(":")[1:]
        file = found.get(artifact)
        if file is None:
            told.append(f"{name} is missing")
        elif (other := re.search(r"-(\d[\w.]*?)\.jar$", file)) and other[1] != version:
            told.append(f"{file} is there, but Hadoop {hadoop} needs {name}")
    return told


def advice(hadoop: str) -> str:
    """Say how the files get onto the class path."""
    packages = ",".join(JARS.get(hadoop, (f"org.apache.hadoop:hadoop-aws:{hadoop}",)))
    return f"put the files into pyspark/jars, or let Spark fetch them: spark.jars.packages = {packages} in spark.conf"


@functools.cache
def _told_copies() -> None:
    logger.info("Spark has no s3a (docs/production.md): what it reads and writes in S3 goes over copies on this disk")


def by_itself(spark: SparkSession) -> bool:
    """Tell whether Spark reads and writes S3 itself; otherwise copies are used.

    Raises:
        BadConfigError: if files of the wrong version are there, or the session's executors are on other machines and
            files are missing.
    """
    hadoop = hadoop_version(spark)
    found = found_jars(spark)
    told = problems(hadoop, found)
    if not told:
        return True
    local = str(spark.sparkContext.master).startswith("local")
    if found or not local:
        raise BadConfigError(f"Spark cannot reach S3: {'; '.join(told)}. To mend it, {advice(hadoop)}")
    _told_copies()
    return False


def uses_s3(settings: Settings) -> bool:
    """Tell whether a job reads or writes anything in an object store."""
    places = (settings.source.path, settings.lake.warehouse, settings.scoring.candidates)
    return not all(storage.is_local(place) for place in places)


class Copies:
    """Files of an object store on this machine's disk, for as long as the process lives."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="onetrans-spark-")
        self.root = Path(self._folder.name).resolve()
        self._seen: dict[str, tuple[int, int]] = {}

    def of(self, files: Sequence[str]) -> list[str]:
        """Return a local copy of each file; one that has changed since it was copied is fetched again.

        Raises:
            NotReadyError: if one is not there any more.
            StoreFailedError: if a copy has not the size of its file.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._copy, files))

    def _copy(self, file: str) -> str:
        filesystem, inner = storage.open_filesystem(file)
        info = filesystem.get_file_info(inner)
        if info.type != fs.FileType.File:
            raise NotReadyError(f"{file} vanished before it was read")
        target = self.root / file.replace("://", "/", 1)
        if self._seen.get(file) != (info.size, info.mtime_ns):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{uuid.uuid4().hex}.part")
            fs.copy_files(inner, str(partial), filesystem, fs.LocalFileSystem())
            if partial.stat().st_size != info.size:
                raise StoreFailedError(f"{file}: {partial.stat().st_size:,} of {info.size:,} bytes came; run it again")
            partial.replace(target)
            self._seen[file] = (info.size, info.mtime_ns)
        return str(target)

    def new_folder(self) -> Path:
        """Return a folder that does not exist yet, for Spark to write into."""
        return self.root / "written" / uuid.uuid4().hex

    def put(self, folder: Path, path: str) -> None:
        """Put the files that Spark wrote into a folder into an object store.

        Raises:
            StoreFailedError: if an object has not the size of its file.
        """
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith((".", "_")))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda file: _put(file, f"{path}/{file.relative_to(folder)}"), files))


def _put(file: Path, address: str) -> None:
    filesystem, inner = storage.open_filesystem(address)
    fs.copy_files(str(file), inner, fs.LocalFileSystem(), filesystem)
    there = filesystem.get_file_info(inner).size
    if there != file.stat().st_size:
        raise StoreFailedError(f"{address}: {there or 0:,} of {file.stat().st_size:,} bytes arrived; run it again")


@functools.cache
def copies() -> Copies:
    """Return this process's copies."""
    return Copies()


def readable(spark: SparkSession, files: Sequence[str]) -> list[str]:
    """Return addresses that Spark can open: of files in S3 themselves, or of their copies here."""
    if all(storage.is_local(file) for file in files) or by_itself(spark):
        return list(files)
    return copies().of(files)


def original(address: SparkColumn) -> SparkColumn:
    """Return the address in the store of a file that Spark read, where that was a copy; any other address as it is."""
    if not copies.cache_info().currsize:
        return address
    return F.regexp_replace(address, f"^file:///*{re.escape(str(copies().root).lstrip('/'))}/(\\w+)/", "$1://")


def write(frame: DataFrame, path: str, options: Mapping[str, str]) -> None:
    """Write a frame as Parquet files into a folder, beside what is there.

    In an object store they are complete one by one; that the folder is complete is said by what is written after it.

    Raises:
        StoreFailedError: if not all of it arrived in the store.
    """
    writer = frame.write.mode("append").options(**options)
    if storage.is_local(path) or by_itself(frame.sparkSession):
        writer.parquet(path)
        return
    folder = copies().new_folder()
    try:
        writer.parquet(str(folder))
        copies().put(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _java(spark: SparkSession) -> Any:
    return spark.sparkContext._jvm
