"""What ``tests/unprotected.py`` takes away is still there, and so are the tests that are to notice it."""

import ast

import pytest

from tests.unprotected import PROTECTIONS, REPOSITORY, without


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda protection: protection.name)
def test_a_protection_can_be_taken_away_and_its_tests_exist(protection):
    ast.parse(without(protection))
    for test in protection.tests:
        path, _, name = test.partition("::")
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        assert f"def {name}(" in text if name else text
