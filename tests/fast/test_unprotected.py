"""What ``tests/unprotected.py`` takes away is still there, and so are the tests that are to notice it."""

import ast

import pytest

from tests.unprotected import PROTECTIONS, REPOSITORY, failures, without


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda protection: protection.name)
def test_a_protection_can_be_taken_away_and_its_tests_exist(protection):
    ast.parse(without(protection))
    for test in protection.tests:
        path, _, name = test.partition("::")
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        assert f"def {name}(" in text if name else text


def test_a_test_that_could_not_be_set_up_has_not_failed():
    failed = "FAILED tests/day/test_airflow_faults.py::test_x - AssertionError: not there"
    set_up = "ERROR tests/day/test_airflow_faults.py::test_x - ServerError: MLflow is not ready after 120 s"
    assert failures(f"F\n{failed}\n1 failed in 3 s") == [failed]
    assert failures(f"E\n{set_up}\n1 error in 120 s") == []
