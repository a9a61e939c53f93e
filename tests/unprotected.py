"""Whether each test of a fault fails once its protection is taken away: ``python -m tests.unprotected [NAME ...]``.

The repository is copied to a temporary folder, one protection is taken out of the copy, and the tests of its fault are
run there.  They have to fail.  Without names all are tried but the long ones, which start an Airflow of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "var", "__pycache__", "*.egg-info", ".*_cache")


@dataclass(frozen=True)
class Protection:
    """What keeps a fault harmless, and how to do without it."""

    name: str
    what: str
    """The protection, in words."""
    file: str
    text: str
    """Where it stands in ``file``, once."""
    instead: str
    """What is put there to be without it."""
    tests: tuple[str, ...]
    """Tests that have to fail then."""
    long: bool = False
    """Whether they start an Airflow."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables without which another protection would do as well, or the test take long to fail."""


FAULTS, LAKE = "tests/component/test_faults.py", "tests/component/test_lake.py"
AIRFLOW, NIGHTS = "tests/day/test_airflow_faults.py", "tests/day/test_nights.py"

PROTECTIONS = (
    Protection(
        "manifest",
        "what a killed job left is no attempt: the manifest, written last, names the folder",
        "onetrans/lake.py",
        "        return Staged.from_dict(storage.read_json(path))\n\n    def staged_days",
        "        found = Staged.from_dict(storage.read_json(path))\n"
        "        attempts = storage.local_path(found.path).parent.iterdir()\n"
        "        newest = max(attempts, key=lambda folder: folder.stat().st_mtime_ns)\n"
        "        return Staged(**{**vars(found), 'path': str(newest)})\n\n"
        "    def staged_days",
        (f"{LAKE}::test_a_job_killed_while_it_writes_leaves_the_last_staged_day",),
    ),
    Protection(
        "commit",
        "delete and append are one commit",
        "onetrans/lake.py",
        "                        transaction.delete(where)\n",
        "                        target.delete(where)\n",
        (f"{LAKE}::test_a_killed_publisher_leaves_a_whole_day_and_can_run_again",),
    ),
    Protection(
        "replace",
        "a day that is published again replaces the day",
        "onetrans/lake.py",
        "                    if present:\n                        transaction.delete(where)\n",
        "",
        (f"{LAKE}::test_two_writers_of_one_day_leave_one_of_them_whole",),
    ),
    Protection(
        "checkpoint",
        "a training that was cut off goes on from its checkpoint",
        "onetrans/train.py",
        "            checkpoint = Checkpoint.load(self.checkpoint_folder)\n",
        "            checkpoint = None\n",
        (f"{FAULTS}::test_a_trainer_killed_in_mid_epoch_is_recorded_once",),
    ),
    Protection(
        "alone",
        "one process at a time trains a model of a plan",
        "onetrans/train.py",
        "    except BlockingIOError:\n        return False\n    return True\n",
        "    except BlockingIOError:\n        return True\n    return True\n",
        (f"{FAULTS}::test_two_trainings_of_one_day_at_once_train_once",),
    ),
    Protection(
        "not ready",
        "an MLflow that does not answer is not a failure of the step's own",
        "onetrans/tracking.py",
        'if code not in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):\n            raise\n'
        '        unharmed = "" if look else "; nothing was promoted"\n'
        "        raise NotReadyError(",
        'if code not in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):\n            raise\n'
        '        unharmed = "" if look else "; nothing was promoted"\n'
        "        raise ValueError(",
        (f"{FAULTS}::test_mlflow_that_is_away_for_long_costs_tries_and_nothing_else",),
    ),
    Protection(
        "later day",
        "an old day's model never takes the place of a later day's",
        "onetrans/registry.py",
        "champion.tags[TAG_DAY] > str(plan.ds):\n",
        'champion.tags[TAG_DAY] > "9999":\n',
        (f"{FAULTS}::test_an_old_day_and_tonights_are_promoted_at_once",),
    ),
    Protection(
        "turn",
        "processes of one machine move the champion one at a time",
        "onetrans/tracking.py",
        "        fcntl.flock(file, fcntl.LOCK_EX)\n        _turn.mine",
        "        _turn.mine",
        ("tests/component/test_registry.py::test_the_champion_is_read_right_before_the_swap",),
    ),
    Protection(
        "worker",
        "a step ends with its worker, so that the next try is alone",
        "dags/steps.py",
        '    if sys.platform != "linux":\n        return None\n    prctl',
        "    if parent:\n        return None\n    prctl",
        ("tests/fast/test_dags.py::test_a_step_ends_with_its_worker_when_that_is_killed",),
    ),
    Protection(
        "revive",
        "a server of Airflow's that ended is started again",
        "infra/local/airflow.py",
        "        ended = [server for server in self.servers if server.pid is None]\n",
        "        ended: list[Server] = []\n",
        (
            f"{AIRFLOW}::test_the_scheduler_is_killed_during_a_day",
            f"{AIRFLOW}::test_the_database_is_restarted_during_a_day",
        ),
        long=True,
        environment={"GOES_THROUGH_S": "600"},  # nothing but a server that is started would move the day
    ),
    Protection(
        "retries",
        "what failed for a cause that passes is tried again",
        "dags/steps.py",
        '    "retries": 3,\n',
        '    "retries": 0,\n',
        (f"{AIRFLOW}::test_the_disk_is_full_while_a_day_is_staged",),
        long=True,
    ),
    Protection(
        "not ready, through Airflow",
        "a step that MLflow does not answer is tried again",
        "dags/steps.py",
        "    if ended.code == EXIT_NOT_READY:\n        raise AirflowException(",
        "    if ended.code == EXIT_NOT_READY:\n        raise AirflowFailException(",
        (f"{AIRFLOW}::test_mlflow_is_away_for_two_minutes_while_models_train",),
        long=True,
        environment={"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},  # its client's patience would outlast two minutes
    ),
    Protection(
        "later day, through Airflow",
        "an old day that is cleared and run again does not promote its model over the next day's",
        "onetrans/registry.py",
        "champion.tags[TAG_DAY] > str(plan.ds):\n",
        'champion.tags[TAG_DAY] > "9999":\n',
        (
            f"{AIRFLOW}::test_a_day_is_cleared_and_run_again_while_the_next_one_trains",
            f"{NIGHTS}::test_each_day_was_promoted_once_and_tonights_model_serves",
        ),
        long=True,
    ),
    Protection(
        "order",
        "the tables of a day wait for those of the day before",
        "dags/feature_tables.py",
        "        others_of_a_backfill=[BEFORE_IN_A_BACKFILL],\n",
        "        others_of_a_backfill=[],\n",
        (f"{NIGHTS}::test_days_that_are_backfilled_side_by_side_read_their_logs_together",),
        long=True,
    ),
    Protection(
        "order of models",
        "the model of a day waits for that of the day before",
        "dags/ranking_model.py",
        "        others_of_a_backfill=[BEFORE_IN_A_BACKFILL, TABLES_OF_THE_DAY],\n",
        "        others_of_a_backfill=[TABLES_OF_THE_DAY],\n",
        (f"{NIGHTS}::test_models_of_a_backfill_are_made_in_the_order_of_days",),
        long=True,
    ),
)


def copied(folder: Path, protection: Protection | None = None) -> Path:
    """Copy the repository into ``folder``, without a protection if one is given; return the copy.

    Raises:
        ValueError: if the protection does not stand where it is said to.
    """
    copy = folder / "repository"
    shutil.copytree(REPOSITORY, copy, ignore=_LEFT_OUT, symlinks=True)
    if protection is not None:
        (copy / protection.file).write_text(without(protection), encoding="utf-8")
    return copy


def without(protection: Protection) -> str:
    """Return the file of a protection without it.

    Raises:
        ValueError: if it does not stand there, once.
    """
    text = (REPOSITORY / protection.file).read_text(encoding="utf-8")
    found = text.count(protection.text)
    if found != 1:
        raise ValueError(f"the protection {protection.name!r} stands {found} times in {protection.file}, not once")
    return text.replace(protection.text, protection.instead)


def failures(output: str) -> list[str]:
    """Return what pytest says of tests that failed; one whose fixtures could not be set up was not run at all."""
    return [line for line in output.splitlines() if line.startswith("FAILED tests")]


def main(argv: list[str] | None = None) -> int:
    """Try the protections; return 1 if a test passes without its own."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.unprotected", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [protection.name for protection in PROTECTIONS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(names)}")
    parser.add_argument("--tests", default="", metavar="PART", help="only tests whose name holds this")
    arguments = parser.parse_args(argv)
    wanted = arguments.names
    if unknown := set(wanted) - set(names):
        parser.error(f"no protection is called {', '.join(sorted(unknown))}")
    if not any(arguments.tests in test for protection in PROTECTIONS for test in protection.tests):
        parser.error(f"no test's name holds {arguments.tests!r}")
    passed = 0
    for protection in PROTECTIONS:
        if protection.name not in wanted if wanted else protection.long:
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="onetrans-unprotected-") as folder:
            copy = copied(Path(folder), protection)
            for test in (test for test in protection.tests if arguments.tests in test):
                command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
                # Wide enough for pytest's last line on a test to say why it failed.
                environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "400", **protection.environment}
                done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
                said = failures(done.stdout) if done.returncode == 1 else []
                fails = bool(said)
                passed += not fails
                print(
                    f"{'fails' if fails else 'DOES NOT FAIL'} without {protection.name!r} ({protection.what}): {test}"
                )
                print(f"    after {time.monotonic() - begun:.0f} s", flush=True)
                if fails:  # for a reader to judge: it may have failed for another reason
                    print(*(f"    {line}" for line in said), sep="\n", flush=True)
                else:
                    print(done.stdout[-2000:] + done.stderr[-2000:])
    return min(passed, 1)


if __name__ == "__main__":
    sys.exit(main())
