"""The floating-point operations that a training step of OneTrans needs, counted from configuration and batch.

Needed means: what the result depends on.  Padding, masked scores, recomputation
and optimizers are not counted; the S-tokens count once per request, a block's
queries for kept tokens alone.  A product of (m, k) and (k, n) is 2 m k n
operations; the backward pass needs twice the forward pass.
"""

from __future__ import annotations

from torch import Tensor

from onetrans.batch import RequestBatch
from onetrans.models import OneTransConfig
from onetrans.models.tokenizer import feature_groups
from onetrans.schema import FeatureSchema


def training_flops(config: OneTransConfig, schema: FeatureSchema, batch: RequestBatch) -> float:
    """Return the operations of forward and backward pass together."""
    return 3.0 * forward_flops(config, schema, batch)


def forward_flops(config: OneTransConfig, schema: FeatureSchema, batch: RequestBatch) -> float:
    """Return the operations of the forward pass."""
    lengths_R = (batch.event_offsets_O[1:] - batch.event_offsets_O[:-1]).clamp(max=config.max_seq_len).double()
    candidates_R = (batch.candidate_offsets_O[1:] - batch.candidate_offsets_O[:-1]).double()
    macs = _tokenizer_macs(config, schema, float(lengths_R.sum()), batch)
    separators = len(schema.sequences) - 1 if config.separators else 0
    tokens_R = lengths_R + separators
    d, p, inner = config.hidden_dim, config.num_ns_tokens, config.hidden_dim * config.ffn_multiplier
    ns_tokens = batch.num_candidates * p
    # Query, output, gate and FFN; key and value.
    asking, keyed = (
        (3 if config.gated_attention else 2) * d * d + 2 * d * inner,
        2 * d * config.kv_heads * config.head_dim,
    )
    for queries in config.query_schedule():
        whole = separators if queries == config.max_seq_len else 0
        kept_R = tokens_R.clamp(max=queries + whole)
        macs += float(tokens_R.sum()) * keyed + float(kept_R.sum()) * asking + ns_tokens * (keyed + asking)
        seen = float(_seen_by_s(tokens_R, kept_R, config).sum())
        seen += float((candidates_R * p * tokens_R).sum()) + batch.num_candidates * _seen_among(p, config)
        macs += 2 * d * seen
        tokens_R = kept_R
        if not queries:
            break
    states = p + (1 if config.query_schedule()[-1] else 0)
    macs += batch.num_candidates * 2 * (states * d * d + d)
    return 2.0 * macs


def _seen_by_s(tokens_R: Tensor, kept_R: Tensor, config: OneTransConfig) -> Tensor:
    """Return the pairs of query and key of stage I, per request."""
    if config.attention == "full":
        return kept_R * tokens_R
    # The first of n tokens sees one, the last n; a window caps each.  Sum over all, less those that do not ask.
    window = config.sliding_window or float("inf")
    return _triangle(tokens_R, window) - _triangle(tokens_R - kept_R, window)


def _triangle(tokens_R: Tensor, window: float) -> Tensor:
    """Return 1 + 2 + ... + n, each term at most ``window``."""
    rising_R = tokens_R.clamp(max=window)
    rest_R = tokens_R - rising_R
    return rising_R * (rising_R + 1) / 2 + (rest_R * window).where(rest_R > 0, rest_R)


def _seen_among(positions: int, config: OneTransConfig) -> float:
    return positions * positions if config.attention == "full" else positions * (positions + 1) / 2


def _tokenizer_macs(config: OneTransConfig, schema: FeatureSchema, events: float, batch: RequestBatch) -> float:
    d, width = config.hidden_dim, config.embedding_dim
    macs = events * (len(schema.of_side("event")) * width * d + d * d)
    if config.tokenizer == "auto_split":
        out = config.num_ns_tokens * d
        request = (len(schema.of_side("user")) + len(schema.of_side("context"))) * width
        macs += batch.num_requests * request * out
        return macs + batch.num_candidates * (len(schema.of_side("item")) * width * out + out * out)
    for side, start, stop in feature_groups(schema, config.num_ns_tokens):
        rows = batch.num_candidates if side == "item" else batch.num_requests
        macs += rows * ((stop - start) * width * d + d * d)
    return macs
