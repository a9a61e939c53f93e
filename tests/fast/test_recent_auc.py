"""The AUC a training shows while it runs: exact over the batches held, none where it does not exist."""

import pytest
import torch

from onetrans import recent_auc
from onetrans.metrics import auc
from onetrans.recent_auc import RecentAuc


def test_it_is_that_of_the_last_batches(monkeypatch):
    monkeypatch.setattr(recent_auc, "IMPRESSIONS", 20)
    torch.manual_seed(0)
    batches = [((torch.rand(8) < 0.4).float(), torch.randn(8)) for _ in range(5)]
    recent = RecentAuc()
    assert recent.value() is None
    recent.add(torch.zeros(8), torch.randn(8))
    assert recent.value() is None
    for click_N, logit_N in batches:
        recent.add(click_N, logit_N.requires_grad_())
    click_N, logit_N = (torch.cat([b[n] for b in batches[-3:]]).detach().numpy() for n in (0, 1))
    assert recent.value() == pytest.approx(auc(click_N, logit_N))
    assert recent.value() != pytest.approx(auc(*(torch.cat([b[n] for b in batches]).detach().numpy() for n in (0, 1))))
