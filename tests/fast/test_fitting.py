"""Another conversion for published days: a clicked impression converts if the named event was logged with it."""

import pyarrow as pa
import torch

from benchmarks.fitting import _keys, _with_conversions
from onetrans.loader import Cursor, Loaded
from tests.batches import model_schema, random_batch


def test_only_a_clicked_impression_with_the_event_converts():
    batch = random_batch(model_schema(), [2, 2], [1, 0])
    batch.click_N[:] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    keys = pa.table({"request_id": ["a", "a", "b", "b"], "item_id": ["1", "2", "1", "2"]})
    here = Cursor(0, 0, 0)
    liked = _keys(pa.table({"request_id": ["a", "a", "b"], "item_id": ["1", "2", "2"]}))
    found = _with_conversions(Loaded(batch, here, here, keys), liked)
    assert found.conversion_N.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert found.click_N.tolist() == batch.click_N.tolist()
