"""What `onetrans report` and `onetrans status` say of a day that is not judged yet."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from onetrans.report import report
from onetrans.settings import Settings, TrainingSettings


def test_a_day_says_how_far_its_trainings_came(tmp_path: Path) -> None:
    settings = Settings(training=TrainingSettings(runs=str(tmp_path)))
    plan = {
        "plan_id": "p",
        "created_at": "2022-05-05T00:00:00",
        "preset": "tiny",
        "train_days": [],
        "warm_start_ds": None,
    }
    folder = tmp_path / "ds=2022-05-04" / "p"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({**plan, "models": {"onetrans": {}, "dcnv2_din": {}}}))
    states = []
    for file in ("", "onetrans/.lock", "onetrans/finished.json", "dcnv2_din/.lock", "dcnv2_din/finished.json"):
        if file:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("{}")
        states.append(report(settings, date(2022, 5, 4), date(2022, 5, 4))[0]["state"])
    trained = "training begun, onetrans trained"
    assert states == ["planned", "training begun", trained, trained, "trained"]
