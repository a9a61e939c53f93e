"""The reason of a forced promotion: what is refused, and that it is refused before hours of training."""

import pytest

from onetrans import cli
from onetrans.errors import EXIT_BAD_CONFIG, BadConfigError
from onetrans.forced import forced_reason
from onetrans.settings import GateSettings


def test_no_reason_forces_nothing_and_one_that_is_given_is_kept():
    assert forced_reason(None, GateSettings(mode="off")) == ""
    assert forced_reason(" a broken baseline ", GateSettings()) == "a broken baseline"


@pytest.mark.parametrize("reason", ["", "   "])
def test_a_blank_reason_is_refused(reason):
    with pytest.raises(BadConfigError, match="needs a reason, and the one given is blank"):
        forced_reason(reason, GateSettings())


@pytest.mark.parametrize("mode", ["dry_run", "off"])
def test_a_mode_that_leaves_the_champion_cannot_be_forced(mode):
    with pytest.raises(BadConfigError, match=f"gate.mode = {mode} leaves the champion as it is"):
        forced_reason("a broken baseline", GateSettings(mode=mode))


def test_it_is_refused_before_anything_is_planned(monkeypatch, capsys):
    monkeypatch.setenv("ONETRANS_GATE_MODE", "dry_run")
    assert cli.main(["plan", "--ds", "2022-05-04", "--force=a broken baseline"]) == EXIT_BAD_CONFIG
    assert "gate.mode = dry_run leaves the champion as it is" in capsys.readouterr().err
