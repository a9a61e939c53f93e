"""A PostgreSQL of its own for tests: one folder, one Unix socket, no port, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OWNER = "postgres"
"""Account of Debian's packages; the server refuses to run as root."""


def why_missing() -> str:
    """Say why no server can be started here; empty: one can."""
    if _program("initdb") is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and not _account_exists():
        return f"PostgreSQL does not run as root, and there is no account {_OWNER}"
    return ""


class Postgres:
    """A server that can be stopped and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        """Create the data in ``folder``, which the server's account owns."""
        self.folder = folder
        self.user = _OWNER if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        self._run("initdb", "--pgdata", str(self.data), "--auth", "trust", "--username", self.user, "--no-sync")
        settings = [
            "listen_addresses = ''",
            f"unix_socket_directories = '{folder}'",
            "max_connections = 200",
            "shared_buffers = 32MB",
            # The data is as short-lived as the test; a server that is killed recovers all the same.
            "synchronous_commit = off",
        ]
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write("\n".join(settings) + "\n")

    @property
    def data(self) -> Path:
        """Folder of the server's data."""
        return self.folder / "data"

    def address(self, database: str) -> str:
        """Return the SQLAlchemy address of a database."""
        return f"postgresql://{self.user}@/{database}?host={self.folder}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._run("pg_ctl", "start", "--pgdata", str(self.data), "--wait", "--log", str(self.folder / "server.log"))

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; ``immediate`` is what a power cut leaves, ``fast`` ends every connection first."""
        self._run("pg_ctl", "stop", "--pgdata", str(self.data), "--wait", "--mode", mode)

    def create(self, database: str) -> str:
        """Create an empty database and return its address."""
        self._run("createdb", "--host", str(self.folder), "--username", self.user, database)
        return self.address(database)

    def require_password(self, password: str) -> None:
        """Ask everybody for a password from now on."""
        command = f"ALTER ROLE {self.user} PASSWORD '{password}'"
        self._run("psql", "--host", str(self.folder), "--username", self.user, "--command", command, "postgres")
        (self.data / "pg_hba.conf").write_text("local all all scram-sha-256\n", encoding="utf-8")
        self._run("pg_ctl", "reload", "--pgdata", str(self.data))
        deadline = time.monotonic() + 30
        while self._trusts():  # the server reads its files when it comes to it
            assert time.monotonic() < deadline, "PostgreSQL still asks for no password"
            time.sleep(0.1)

    def _trusts(self) -> bool:
        program = _program("psql")
        assert program is not None
        command = [
            program,
            "--host",
            str(self.folder),
            "--username",
            self.user,
            "--no-password",
            "--command",
            "SELECT 1",
        ]
        return subprocess.run([*command, "postgres"], capture_output=True, cwd=self.folder).returncode == 0

    def restore(self, dump: Path, database: str) -> None:
        """Create a database from what ``pg_dump`` wrote."""
        self.create(database)
        readable = shutil.copy(dump, self.folder / dump.name)  # the server's account may not enter the dump's folder
        os.chmod(readable, 0o644)
        self._run("pg_restore", "--host", str(self.folder), "--username", self.user, "--dbname", database, readable)

    def _run(self, name: str, *arguments: str) -> None:
        program = _program(name)
        assert program is not None
        # Output goes to a file: a server that `pg_ctl` started keeps a pipe open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [program, *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=self.user if os.geteuid() == 0 else None,
                timeout=120,
            )
            output.seek(0)
            assert done.returncode == 0, f"{name}: {output.read().decode(errors='replace')}"


@contextmanager
def running() -> Iterator[Postgres]:
    """Start a server in a folder under the system's temporary one: a socket's path is at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="onetrans-pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, _OWNER)
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            if (server.data / "postmaster.pid").exists():
                server.stop()
    finally:
        shutil.rmtree(folder)


def _program(name: str) -> str | None:
    """Return the path of a program of the newest PostgreSQL; Debian keeps servers' programs off the search path."""
    packaged = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3].split(".")[0])
    )
    return str(packaged[-1]) if packaged else shutil.which(name)


def _account_exists() -> bool:
    try:
        pwd.getpwnam(_OWNER)
    except KeyError:
        return False
    return True
