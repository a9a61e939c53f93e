"""Both models written plainly, as a reference: one candidate at a time or padded, nothing shared, nothing skipped.

The parameters are those of the model under test; everything else is written
anew from the papers: OneTrans with one [S ; NS] sequence per candidate, padded,
an explicit mask, all queries computed and the pruned ones dropped afterwards;
DIN with its score MLP on the concatenation [t, e, t - e, t * e] of each pair.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SHORTEST_S, LONGEST_S = 60.0, 365 * 86_400.0


def lookup(model, side, rows, numbers=None):
    """Embeddings of one row of feature values; ``numbers`` are those of its vectors, end to end."""
    slots, start = [], 0
    for feature, row in zip(model.schema.of_side(side), rows.tolist(), strict=True):
        slot = model.embeddings.table(feature.embedding)[row]
        if feature.kind == "vector" and row:
            matrix = model.embeddings.map(feature.embedding)
            slot = slot + (matrix * numbers[start : start + feature.dim].to(matrix.dtype)).sum(1)
        slots.append(slot)
        start += feature.dim
    return torch.cat(slots)


def request_and_item(model, batch, r, n):
    """Embeddings of user, context and item of one candidate."""

    def of(vectors, row):
        return None if vectors is None else vectors[row]

    return [
        lookup(model, "user", batch.user_RU[r], of(batch.user_vector_RX, r)),
        lookup(model, "context", batch.context_RK[r], of(batch.context_vector_RX, r)),
        lookup(model, "item", batch.item_NI[n], of(batch.item_vector_NX, n)),
    ]


def candidates_of(batch):
    """Yield (request, candidate, its event numbers oldest first)."""
    starts, ends = batch.candidate_offsets_O[:-1].tolist(), batch.candidate_offsets_O[1:].tolist()
    events = batch.event_offsets_O.tolist()
    for r, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for n in range(start, end):
            yield r, n, list(range(events[r], events[r + 1]))


def ns_tokens(model, batch, r, n):
    sides = request_and_item(model, batch, r, n)
    tokenizer = model.ns_tokenizer
    if model.config.tokenizer == "auto_split":
        hidden = F.gelu(tokenizer.hidden.linear(torch.cat(sides)))
        tokens = tokenizer.out(hidden).view(model.config.num_ns_tokens, model.config.hidden_dim)
        return rms_norm(tokens, tokenizer.norm)
    by_side = dict(zip(("user", "context", "item"), sides, strict=True))
    width = model.config.embedding_dim
    tokens = torch.stack(
        [
            mlp(by_side[side][start * width : stop * width])
            for (side, start, stop), mlp in zip(tokenizer.groups, tokenizer.mlps, strict=True)
        ]
    )
    return rms_norm(tokens, tokenizer.norm)


def s_tokens(model, batch, r, events):
    """Tokens of one request in the order of the merge, and the time of each."""
    config, tokenizer = model.config, model.s_tokenizer
    events = events[max(0, len(events) - config.max_seq_len) :]
    made = []
    for e in events:
        sequence = int(batch.event_sequence_E[e])
        token = rms_norm(tokenizer.mlps[sequence](lookup(model, "event", batch.event_EV[e])), tokenizer.norm)
        token = token + tokenizer.type_SD[sequence]
        made.append((sequence, token, int(batch.event_time_E[e])))
    if config.merge == "intent_ordered":
        parts = []
        for sequence in reversed(range(len(model.schema.sequences))):
            parts += [m for m in made if m[0] == sequence]
            if config.separators and sequence > 0:
                parts.append((-1, tokenizer.separator_D, int(batch.request_time_R[r])))
        made = parts
    tokens = [token for _, token, _ in made]
    if config.position == "learned":
        tokens = [token + tokenizer.position_LD[i] for i, token in enumerate(tokens)]
    return tokens, [time for _, _, time in made]


def turn(x_HD, position, index, time_us):
    """Rotate one token's heads: plane a is (x[a], x[a + D/2]) as a complex number."""
    if position not in ("rotary", "rotary_time"):
        return x_HD
    planes = x_HD.shape[-1] // 2
    by_time = planes // 2 if position == "rotary_time" else 0
    by_index = planes - by_time
    angles = [index / 10_000 ** (a / by_index) for a in range(by_index)]
    for a in range(by_time):
        period = SHORTEST_S * (LONGEST_S / SHORTEST_S) ** (a / max(by_time - 1, 1))
        angles.append(math.fmod(time_us * 1e-6 / period, 1.0) * 2 * math.pi)
    x = torch.complex(x_HD[:, :planes], x_HD[:, planes:])
    turned = x * torch.polar(torch.ones(planes, dtype=x_HD.dtype), torch.tensor(angles, dtype=x_HD.dtype))
    return torch.cat((turned.real, turned.imag), dim=1)


def rms_norm(x, norm):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight


def mixed(linear, x_TI, is_ns):
    """Apply a mixed linear layer token by token; the NS-tokens are the last ones, in order."""
    out, position = [], 0
    for token, ns in zip(x_TI, is_ns, strict=True):
        if ns and linear.weight_ns is not None:
            out.append(token @ linear.weight_ns[position])
        else:
            out.append(linear.weight_s @ token)
        position += ns
    return torch.stack(out)


def bucket(x):
    """0 for nothing, then two buckets per doubling, by logarithm."""
    return 0 if x == 0 else 1 + math.floor(2 * math.log2(x))


def relative_bias(tables, asks, index, time):
    """Bias (H, A, T) by the tokens and the seconds between each asking token and each token."""
    ranks, times = tables.rank_KH.shape[0], tables.time_KH.shape[0]
    rank = [[min(bucket(abs(index[t] - i)), ranks - 1) for i in index] for t in asks]
    apart = [[min(bucket(abs(time[t] - other) // 1_000_000), times - 1) for other in time] for t in asks]
    return (tables.rank_KH[torch.tensor(rank)] + tables.time_KH[torch.tensor(apart)]).permute(2, 0, 1)


def plain_onetrans(model, batch):
    """Return (ctr, cvr) of every candidate, each from its own copy of [S ; NS]."""
    config, norms = model.config, rms_norm
    longest = config.max_seq_len + (len(model.schema.sequences) - 1 if config.separators else 0)
    ctr, cvr = [], []
    for r, n, events in candidates_of(batch):
        tokens, times = s_tokens(model, batch, r, events)
        real, ns = len(tokens), ns_tokens(model, batch, r, n)
        padding = longest - real
        x_TM = torch.stack([torch.zeros_like(ns[0])] * padding + tokens + list(ns))
        exists = [False] * padding + [True] * (real + len(ns))
        is_ns = [False] * longest + [True] * len(ns)
        index = [0] * padding + list(range(real)) + [real] * len(ns)
        time = [0] * padding + times + [int(batch.request_time_R[r])] * len(ns)
        for block, queries in zip(model.blocks, model.schedule, strict=True):
            total = x_TM.shape[0]
            normed = norms(x_TM, block.norm_attention)
            kv = mixed(block.key_value, normed, is_ns)
            kv_heads = config.num_kv_heads or config.num_heads
            k_THD = kv[:, : kv_heads * config.head_dim].unflatten(1, (kv_heads, -1))
            v_THD = kv[:, kv_heads * config.head_dim :].unflatten(1, (kv_heads, -1))
            asks = [t for t in range(total) if is_ns[t] or queries > 0]  # a block without S-queries lacks their weights
            q_AHD = mixed(block.query, normed[asks], [is_ns[t] for t in asks]).unflatten(1, (config.num_heads, -1))
            if config.qk_norm:
                q_AHD, k_THD = norms(q_AHD, block.norm_query), norms(k_THD, block.norm_key)
            k_THD = torch.stack([turn(k_THD[t], config.position, index[t], time[t]) for t in range(total)])
            q_AHD = torch.stack([turn(q, config.position, index[t], time[t]) for q, t in zip(q_AHD, asks, strict=True)])
            of_head = [h * kv_heads // config.num_heads for h in range(config.num_heads)]
            k_THD, v_THD = k_THD[:, of_head], v_THD[:, of_head]
            asks_ns = [is_ns[t] for t in asks]
            asking_A1, asking_ns_A1 = torch.tensor(asks)[:, None], torch.tensor(asks_ns)[:, None]
            other_T = torch.arange(total)
            seen_AT = torch.tensor(exists) & ~(torch.tensor(is_ns) & ~asking_ns_A1)
            if config.attention == "causal":
                seen_AT = seen_AT & (other_T <= asking_A1)
            if config.sliding_window:
                far_AT = torch.tensor(index)[asking_A1] - torch.tensor(index) >= config.sliding_window
                seen_AT = seen_AT & (asking_ns_A1 | ~far_AT)
            seen_AT = seen_AT | (other_T == asking_A1)
            logits_HAT = torch.einsum("ahd,thd->hat", q_AHD, k_THD) / math.sqrt(config.head_dim)
            if config.relative_bias:
                logits_HAT = logits_HAT + relative_bias(block.bias, asks, index, time)
            weights_HAT = logits_HAT.masked_fill(~seen_AT, -math.inf).softmax(-1)
            attended = torch.einsum("hat,thd->ahd", weights_HAT, v_THD).flatten(1)
            if config.gated_attention:
                attended = attended * torch.sigmoid(mixed(block.gate, normed[asks], asks_ns))
            z = x_TM[asks] + mixed(block.out, attended, asks_ns)
            inner = F.gelu(mixed(block.ffn_in, norms(z, block.norm_ffn), asks_ns))
            out = z + mixed(block.ffn_out, inner, asks_ns)
            # Everything was computed; now drop all S-tokens but the most recent ones.
            separators = len(model.schema.sequences) - 1 if config.separators and queries == config.max_seq_len else 0
            last_s = sum(not ns_token for ns_token in is_ns)
            kept = [t for t in asks if is_ns[t] or t >= last_s - queries - separators]
            row = {t: a for a, t in enumerate(asks)}
            x_TM = out[[row[t] for t in kept]]
            exists, is_ns, index, time = ([values[t] for t in kept] for values in (exists, is_ns, index, time))
        x_TM = norms(x_TM, model.norm)
        state = [x_TM[t] for t in range(len(is_ns)) if is_ns[t]]
        if model.schedule[-1]:
            left = [x_TM[t] for t in range(len(is_ns)) if exists[t] and not is_ns[t]]
            state.append(torch.stack(left).mean(0) if left else torch.zeros_like(state[0]))
        ctr.append(model.heads.ctr(torch.cat(state)).squeeze())
        cvr.append(model.heads.cvr(torch.cat(state)).squeeze())
    return torch.stack(ctr), torch.stack(cvr)


def plain_dcnv2_din(model, batch):
    """Return (ctr, cvr) of every candidate; DIN pair by pair.  Batch normalisation needs all candidates at once."""
    config, schema = model.config, model.schema
    width, items = config.embedding_dim, [f.embedding for f in schema.of_side("item")]
    rows = []
    for r, n, events in candidates_of(batch):
        events = events[max(0, len(events) - config.max_seq_len) :]
        user, context, item = request_and_item(model, batch, r, n)
        mapped = list(model.target.mapped(item).split(width))
        target = []
        for table in [*(f.embedding for f in schema.of_side("event")), None]:
            place = items.index(table) if table in items else None
            target.append(mapped.pop(0) if place is None else item[place * width : (place + 1) * width])
        t = torch.cat(target)
        parts = [user, context, item]
        for sequence, pooling in enumerate(model.pooling):
            pooled = torch.zeros_like(t)
            own_rank = -1
            for merged_rank, e_number in enumerate(reversed(events)):
                if int(batch.event_sequence_E[e_number]) != sequence:
                    continue
                own_rank += 1
                rank = merged_rank if config.event_rank == "merged" else own_rank
                age_s = int(batch.request_time_R[r] - batch.event_time_E[e_number]) / 1e6
                recency = model.recency.age.weight[min(int(math.log2(age_s + 1) * 2), 63)]
                recency = recency + model.recency.rank.weight[min(int(math.log2(rank + 1) * 2), 63)]
                e = torch.cat((lookup(model, "event", batch.event_EV[e_number]), recency))
                score = pooling.first(torch.cat((t, e, t - e, t * e)))
                for layer in pooling.rest:
                    score = layer(F.relu(score))
                pooled = pooled + score * e
            parts.append(pooled)
        rows.append(torch.cat(parts))
    x0 = torch.stack(rows)
    x = x0
    for layer in model.cross:
        x = x0 * layer.map(x) + x
    state = torch.cat((x, model.mlp(x0)), dim=1)
    return model.heads.ctr(state).squeeze(1), model.heads.cvr(state).squeeze(1)
