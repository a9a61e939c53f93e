"""The batcher judges by recent work how long a queue takes."""

import asyncio
import time

import numpy as np
from batches import model_schema, random_batch

from onetrans.serving.batcher import Batcher, DeadlineError
from onetrans.serving.calls import Call
from onetrans.serving.engine import Probabilities
from onetrans.settings import ServingSettings

HELD_UP_S = 0.3


def _call(candidates):
    return Call(
        random_batch(model_schema(), [candidates], [0]), [None], [None], [None], [None], [["item"] * candidates]
    )


class Scorer:
    """Takes a while for its first batch."""

    def __init__(self):
        self.batches = 0

    def score(self, batch, users, known, digests):
        self.batches += 1
        if self.batches == 1:
            time.sleep(HELD_UP_S)
        return Probabilities(np.zeros(100), np.zeros(100))


def test_one_small_batch_that_was_held_up_turns_no_call_away():
    async def run():
        batcher, scorer = Batcher(ServingSettings(batch_candidates=1)), Scorer()
        await batcher.start()
        await batcher.score(scorer, _call(1), time.monotonic() + 60)
        asked = [batcher.score(scorer, _call(100), time.monotonic() + HELD_UP_S) for _ in range(2)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.stop()
        return answers

    answers = asyncio.run(run())
    # A slow machine may miss the deadline; turned away is what must not be.
    assert all(isinstance(answer, Probabilities | DeadlineError) for answer in answers), answers
