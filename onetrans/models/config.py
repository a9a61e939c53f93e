"""Model configurations: every choice of both models, its meaning, its checks, and the named sizes.

This docstring is the one place where points that the OneTrans paper (arXiv
2510.26104) leaves open are decided.  Section numbers are the paper's.

Tokens (3.2)
    *Tokenizer MLPs* have one hidden layer and GELU, with biases.  The auto-split
    MLP's hidden layer is as wide as its output (``num_ns_tokens * hidden_dim``),
    which comes closest to the published parameter counts.  A norm follows: embeddings
    start near zero, and unnormalised tokens would drown in what the first block adds.
    *Groups* of the group-wise tokenizer are runs of the schema's features, in the
    order user, context, item and never across two of them, shared out in
    proportion to the number of features: it needs no second description of the
    features.  The item groups come last, so that under the causal mask the
    candidate's tokens see the user's.
    *Sequence type* is a learned vector per behaviour sequence, added to the token.
    *Truncation* keeps the most recent ``max_seq_len`` events of a request, all
    sequences together, before any reordering; [SEP] tokens are not counted.
    *Sequences of a candidate* (found by search for it) cannot share the S side.  The paper
    pools them into NS-tokens; here the pooled form is a feature of the candidate, as a
    number or a vector.
    *[SEP]* is one learned vector.  It stands between two neighbouring sequences
    always, so also beside an empty one: the layout then depends on nothing.

Position and time (Fig. 2 draws it, the text does not say)
    ``rotary_time``: in half of the rotation planes of each head queries and keys
    turn with their index, in the other half with their time.  An attention score
    then depends on how many events and how many seconds lie between the two, and a
    key never changes when later events are appended.  Index counts from the
    oldest kept token; the NS-tokens all stand right after the last S-token, at the
    time of the request, so each of them measures an event's age alike.
    A [SEP] has the time of the request: intent order is not append-stable anyway.
    Also ``rotary`` (index alone), ``learned`` (a learned vector per index, added)
    and ``none``.

Block (3.3)
    *Parameters*: the output projection is mixed as Q, K, V and FFN are; norms are
    shared by all tokens, since the next projection can absorb their gain.  No
    biases inside a block.  FFN: two layers, GELU, 4 times as wide (QKVO and 4 times
    come closest to the published counts).
    *Full attention* means: S-tokens see all S-tokens, NS-tokens all of S and NS.
    S never sees NS even then, otherwise nothing could be shared by the
    candidates of a request.

Beyond the paper (each a field, off by default)
    *QK-norm* scales queries and keys of each head to unit mean square, with one
    learned gain per channel, before rotation.
    *Gated attention* multiplies the heads' outputs by sigmoid(W x), x the block's
    normed input, one gate per channel, before the output projection.  W is mixed as
    the other projections are, and has no bias: gates start around one half.
    *Grouped queries*: with ``num_kv_heads`` fewer keys and values are computed and
    cached; neighbouring query heads share one.
    *Sliding window* counts tokens of the block's input, [SEP] included.  Neighbouring
    queries are scored together against the keys that any of them may see, and no others.
    *Relative bias*: a table per head and block over buckets, half a doubling wide, of
    the events between query and key, and one of the seconds; the same tables in both
    stages.  NS-tokens are one step from the latest event and none from each other.
    It reads differences alone, so cached keys stay valid.  The table of seconds starts
    at zero: how fast interest fades is the log's to tell.  The table of events starts at
    -2^-h per bucket in head h, from the second latest event on: attention falls as
    distance^(-2.9 / 2^h), steeply in the first head, hardly in the last, as in ALiBi
    (arXiv 2108.12409).  From zero all events would start alike, and what the latest of
    L events tells would reach the tokens, and the gradient of its weight, at one part in
    L; so a head that looks at the latest is given, not searched for.  (After one day of
    the simulated shop, where the latest event matters much, a tiny model has a click
    AUC of .64 to .71; with tables from zero .58, as without them.  After eight days
    little is left of that lead: benchmarks/results/ablation.md.)  Slopes by head keep
    others for the whole history.  The latest event and the NS-tokens start equal,
    else the steepest head would see the NS-tokens alone.

Pyramid (3.3)
    The number of S-queries falls linearly over the blocks from ``max_seq_len`` to
    ``num_ns_tokens``, each rounded to the nearest multiple of ``pyramid_multiple`` but
    never below the last, and is absolute: a request with fewer tokens loses none until the schedule falls
    below its own length.  ``first_block`` and ``top_block`` hold the two readings of
    either end.  With ``s_tail`` the S-states left at the top would be read by
    nobody; their mean joins the NS-states in the heads.

Heads (3.1)
    The final NS-states are normalised and concatenated (all of them, as each
    has its own parameters), then one MLP with a hidden layer of ``hidden_dim`` per
    task.  CTR is P(click | impression), CVR is P(conversion | click).

Losses and optimizers (3.1, 4.1)
    *Losses*: binary cross-entropy of either task, that of conversion a mean over the clicked
    impressions, each with weight 1: nothing published prefers one.  Both weights are
    settings (``training.click_weight``, ``training.conversion_weight``).
    *RMSPropV2* is named but not defined: taken to be that of bytedance/monolith, and Adagrad's
    "beta1, beta2" to be its learning rate and what its sum of squares starts from.  The small
    sizes have other optimizers, for the reason given in :mod:`onetrans.optim_config`.

Embeddings
    One width for all tables.  Row 0 ("missing") is learned as any other row.  Rows of
    rare ids may be withheld and those of idle ids reset
    (:mod:`onetrans.models.row_usage`).

Baseline (DCNv2, arXiv 2008.13535; DIN, arXiv 1706.06978)
    *Target* of DIN: the candidate described as an event is, feature by feature:
    where an event feature shares its table with an item feature, that item
    feature's embedding; otherwise a linear map of all the candidate's embeddings.
    *Recency*: every event carries a learned embedding of its age at the request
    and of its rank from the latest of its sequence (log-scaled buckets), so that
    the baseline knows what ``rotary_time`` tells OneTrans of one sequence.  With
    ``event_rank = "merged"`` the rank is that among all sequences: the baseline
    then knows the order that OneTrans reads off its merged sequence, and what is
    left between the two is the transformer.
    *Weights* are not normalised over a sequence, as in DIN: the sum keeps the
    intensity of an interest.
    *Per-task heads* have the same shape as those of OneTrans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from onetrans.errors import BadConfigError

ModelName = Literal["onetrans", "dcnv2_din"]

Tokenizer = Literal["auto_split", "group_wise"]
Merge = Literal["time_ordered", "intent_ordered"]
NsParameters = Literal["own", "shared"]
Attention = Literal["causal", "full"]
FirstBlock = Literal["all", "pruned"]
TopBlock = Literal["ns_only", "s_tail"]
Position = Literal["rotary_time", "rotary", "learned", "none"]
Normalization = Literal["batch", "layer", "none"]
EventRank = Literal["own", "merged"]


@dataclass(frozen=True)
class OneTransConfig:
    """One OneTrans model."""

    embedding_dim: int
    """Width of every embedding table."""
    hidden_dim: int
    """Width of a token."""
    num_layers: int
    """Blocks."""
    num_heads: int
    """Attention heads; they share ``hidden_dim`` evenly."""
    num_ns_tokens: int
    """Tokens made of the non-sequential features."""
    max_seq_len: int
    """Most recent events of a request that become S-tokens, all sequences together."""
    ffn_multiplier: int = 4
    """Width of the FFN's hidden layer over ``hidden_dim``."""
    dropout: float = 0.0
    """Share of each block's attention and FFN outputs dropped in training."""
    tokenizer: Tokenizer = "auto_split"
    """How non-sequential features become tokens: one MLP then a split, or one MLP per group of features."""
    merge: Merge = "time_ordered"
    """Order of the S-tokens: all sequences by time, or whole sequences, strongest intent first."""
    separators: bool = False
    """Whether a learned [SEP] stands between two sequences; for ``intent_ordered`` only."""
    ns_parameters: NsParameters = "own"
    """Whether each NS position has its own projections and FFN, or all tokens share those of S."""
    attention: Attention = "causal"
    """Which earlier tokens a token sees; S never sees NS in either case."""
    pyramid: bool = True
    """Whether the number of S-queries falls from block to block."""
    first_block: FirstBlock = "all"
    """Whether all S-tokens issue queries in the first block, or the pyramid prunes it already."""
    top_block: TopBlock = "ns_only"
    """Whether only NS-tokens issue queries in the top block, or the last ``num_ns_tokens`` S-tokens too."""
    pyramid_multiple: int = 32
    """Numbers of S-queries are rounded to a multiple of this."""
    position: Position = "rotary_time"
    """How a token knows its place and time."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    gated_attention: bool = False
    """Whether each channel of the attention output is scaled by a learned gate of the token."""
    num_kv_heads: int = 0
    """Heads of keys and values, each for as many neighbouring query heads; 0 means ``num_heads``."""
    sliding_window: int = 0
    """Most recent S-tokens, itself included, that an S-token sees; 0 means all. NS-tokens always see all."""
    relative_bias: bool = False
    """Whether scores get a learned bias by the number of events and of seconds between query and key."""
    admit_after: int = 0
    """Lookups in training before an id gets its own row of a hashed table; until then all share row 0.  0: at once."""
    evict_after_days: int = 0
    """Days without a lookup after which a row of a hashed table starts afresh; 0: never."""

    def __post_init__(self) -> None:
        check = _Check("onetrans", self)
        check.types()
        for name in (
            "embedding_dim", "hidden_dim", "num_layers", "num_heads",
            "num_ns_tokens", "max_seq_len", "ffn_multiplier", "pyramid_multiple",
        ):  # fmt: skip
            check.at_least(name, 1)
        check.share("dropout")
        for name in ("admit_after", "evict_after_days"):
            check.at_least(name, 0)
        if self.hidden_dim % self.num_heads:
            check.refuse("hidden_dim", f"must be a multiple of num_heads = {self.num_heads}")
        planes = {"rotary_time": 2, "rotary": 1}.get(self.position, 0)
        if planes and self.head_dim % (2 * planes):
            check.refuse(
                "position",
                f"needs a head width (hidden_dim / num_heads = {self.head_dim}) that is a multiple of {2 * planes}",
            )
        if self.separators and self.merge != "intent_ordered":
            check.refuse("separators", "needs merge = 'intent_ordered': in time order sequences have no border")
        if self.first_block == "pruned" and not self.pyramid:
            check.refuse("first_block", "needs pyramid = True: without it no block is pruned")
        check.at_least("num_kv_heads", 0)
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            check.refuse("num_kv_heads", f"must divide num_heads = {self.num_heads}, or be 0 for as many")
        check.at_least("sliding_window", 0)
        if self.sliding_window and self.attention != "causal":
            check.refuse("sliding_window", "needs attention = 'causal': a window ends with the token that looks")
        if self.sliding_window >= self.max_seq_len:
            check.refuse("sliding_window", f"must be below max_seq_len = {self.max_seq_len}: it would hide nothing")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    def query_schedule(self) -> tuple[int, ...]:
        """Return the largest number of S-queries of each block, first to top (paper section 3.3).

        Block b keeps the outputs of this many most recent S-tokens; the next block sees no others.
        """
        full, top, blocks = self.max_seq_len, self.num_ns_tokens, self.num_layers
        if not self.pyramid:
            queries = [full] * blocks
        else:
            steps, offset = (blocks, 1) if self.first_block == "pruned" else (max(blocks - 1, 1), 0)
            least = min(top, full)
            queries = [
                min(full, max(least, _round(full + (top - full) * (block + offset) / steps, self.pyramid_multiple)))
                for block in range(blocks)
            ]
            if offset == 0:
                queries[0] = full
        queries[-1] = 0 if self.top_block == "ns_only" else min(top, full)
        return tuple(queries)


@dataclass(frozen=True)
class DCNv2DINConfig:
    """One DCNv2 + DIN model, the baseline."""

    embedding_dim: int
    """Width of every embedding table."""
    max_seq_len: int
    """Most recent events of a request that are read, all sequences together."""
    attention_hidden: tuple[int, ...]
    """Hidden layers of DIN's score MLP; one MLP per behaviour sequence."""
    cross_layers: int
    """Cross layers."""
    cross_rank: int
    """Rank of a cross layer's matrix; 0 means full."""
    mlp_hidden: tuple[int, ...]
    """Layers of the MLP beside the cross layers."""
    head_hidden: int
    """Hidden layer of each task's head."""
    event_rank: EventRank = "own"
    """Among which events an event's rank from the latest is counted: its own sequence's or those of all."""
    normalization: Normalization = "batch"
    """Normalisation inside the MLP."""
    dropout: float = 0.0
    """Share of the MLP's activations dropped in training."""
    admit_after: int = 0
    """Lookups in training before an id gets its own row of a hashed table; until then all share row 0.  0: at once."""
    evict_after_days: int = 0
    """Days without a lookup after which a row of a hashed table starts afresh; 0: never."""

    def __post_init__(self) -> None:
        check = _Check("dcnv2_din", self)
        check.types()
        for name in ("embedding_dim", "max_seq_len", "cross_layers", "head_hidden"):
            check.at_least(name, 1)
        for name in ("cross_rank", "admit_after", "evict_after_days"):
            check.at_least(name, 0)
        check.share("dropout")
        for name in ("attention_hidden", "mlp_hidden"):
            widths = getattr(self, name)
            if not widths or any(width < 1 for width in widths):
                check.refuse(name, "must list at least one layer, each at least 1 wide")


ModelConfig = OneTransConfig | DCNv2DINConfig

CONFIGS: dict[str, type[OneTransConfig] | type[DCNv2DINConfig]] = {
    "onetrans": OneTransConfig,
    "dcnv2_din": DCNv2DINConfig,
}
"""Configuration class of each model, by model name."""

ARCHITECTURES: dict[str, int] = {"onetrans": 1, "dcnv2_din": 1}
"""Revision of each model's code: raise it when weights of the same configuration no longer mean the same.

A training goes on from an earlier one of the same revision only; after a change of revision both models start afresh
over the look-back window, by themselves.
"""


def tiny_onetrans() -> OneTransConfig:
    """Smallest useful size: for tests and a laptop's demo."""
    return OneTransConfig(
        embedding_dim=8, hidden_dim=32, num_layers=2, num_heads=2, num_ns_tokens=4, max_seq_len=64,
        pyramid_multiple=8, qk_norm=True,
    )  # fmt: skip


def small_onetrans() -> OneTransConfig:
    """For a daily run on a few CPU cores."""
    return OneTransConfig(
        embedding_dim=16, hidden_dim=64, num_layers=3, num_heads=4, num_ns_tokens=6, max_seq_len=128,
        pyramid_multiple=8, qk_norm=True,
    )  # fmt: skip


def base_onetrans() -> OneTransConfig:
    """OneTrans_S of the paper (section 4.1): 92 M dense parameters on a schema with 100 features, published 91 M."""
    return OneTransConfig(
        embedding_dim=64, hidden_dim=256, num_layers=6, num_heads=4, num_ns_tokens=12, max_seq_len=1190
    )


def large_onetrans() -> OneTransConfig:
    """OneTrans_L of the paper (section 4.1): 322 M dense parameters on a schema with 100 features, published 330 M."""
    return OneTransConfig(
        embedding_dim=64, hidden_dim=384, num_layers=8, num_heads=4, num_ns_tokens=16, max_seq_len=1500
    )


def tiny_dcnv2_din() -> DCNv2DINConfig:
    """Baseline beside :func:`tiny_onetrans`: same embeddings, same events."""
    return DCNv2DINConfig(
        embedding_dim=8, max_seq_len=64, attention_hidden=(32, 16), cross_layers=2, cross_rank=0,
        mlp_hidden=(128, 64), head_hidden=32,
    )  # fmt: skip


def small_dcnv2_din() -> DCNv2DINConfig:
    """Baseline beside :func:`small_onetrans`: same embeddings, same events."""
    return DCNv2DINConfig(
        embedding_dim=16, max_seq_len=128, attention_hidden=(64, 32), cross_layers=3, cross_rank=0,
        mlp_hidden=(256, 128), head_hidden=64,
    )  # fmt: skip


def base_dcnv2_din() -> DCNv2DINConfig:
    """Baseline beside :func:`base_onetrans`: a publicly tuned MLP, low-rank cross layers.

    About 13 M dense parameters on a schema with 100 features; the paper's baseline has 10 M.
    """
    return DCNv2DINConfig(
        embedding_dim=64, max_seq_len=1190, attention_hidden=(256, 128), cross_layers=3, cross_rank=64,
        mlp_hidden=(1024, 512, 256), head_hidden=64,
    )  # fmt: skip


def large_dcnv2_din() -> DCNv2DINConfig:
    """Baseline beside :func:`large_onetrans`: as :func:`base_dcnv2_din`, with its events."""
    return replace(base_dcnv2_din(), max_seq_len=1500)


_PRESETS: dict[str, dict[str, Callable[[], ModelConfig]]] = {
    "onetrans": {
        "tiny": tiny_onetrans,
        "small": small_onetrans,
        "base": base_onetrans,
        "large": large_onetrans,
    },
    "dcnv2_din": {
        "tiny": tiny_dcnv2_din,
        "small": small_dcnv2_din,
        "base": base_dcnv2_din,
        "large": large_dcnv2_din,
    },
}


def preset(model_name: str, preset_name: str) -> ModelConfig:
    """Return the configuration of a model in a named size.

    Raises:
        BadConfigError: if there is no such model or size.
    """
    if model_name not in _PRESETS:
        raise BadConfigError(f"there is no model {model_name!r}; models are {', '.join(_PRESETS)}")
    sizes = _PRESETS[model_name]
    if preset_name not in sizes:
        raise BadConfigError(f"model {model_name} has no preset {preset_name!r}; presets are {', '.join(sizes)}")
    return sizes[preset_name]()


def model_name(config: ModelConfig) -> ModelName:
    """Return the name of the model a configuration describes."""
    return "onetrans" if isinstance(config, OneTransConfig) else "dcnv2_din"


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Return plain JSON data that :func:`config_from_dict` reads back."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
    return {"model": model_name(config), **values}


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """Build a configuration from plain data.

    Raises:
        BadConfigError: on an unknown model or field, a missing field, or a refused value.
    """
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    name = values.pop("model", None)
    if name not in CONFIGS:
        raise BadConfigError(f"model configuration: model = {name!r} is none of {', '.join(CONFIGS)}")
    cls = CONFIGS[name]
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise BadConfigError(f"{name} has no field {unknown[0]!r}; its fields are {', '.join(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise BadConfigError(f"{name}: {str(error).replace('__init__() ', '')}") from error


def _round(value: float, multiple: int) -> int:
    return int(value / multiple + 0.5) * multiple


class _Check:
    """Checks of one configuration; every refusal names model, field, value and reason."""

    def __init__(self, name: str, config: Any) -> None:
        self.name = name
        self.config = config

    def refuse(self, field: str, reason: str) -> None:
        raise BadConfigError(f"{self.name}.{field} = {getattr(self.config, field)!r} {reason}")

    def at_least(self, field: str, low: int) -> None:
        if getattr(self.config, field) < low:
            self.refuse(field, f"must be at least {low}")

    def share(self, field: str) -> None:
        if not 0.0 <= getattr(self.config, field) < 1.0:
            self.refuse(field, "must be at least 0 and below 1")

    def types(self) -> None:
        """Refuse a value that is not of its field's declared type."""
        for field, kind in get_type_hints(type(self.config)).items():
            value = getattr(self.config, field)
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    self.refuse(field, f"is none of {', '.join(map(repr, get_args(kind)))}")
            elif get_origin(kind) is tuple:
                if not isinstance(value, tuple) or any(type(v) is not int for v in value):
                    self.refuse(field, "must be a list of whole numbers")
            elif kind is float:
                if type(value) not in (int, float):
                    self.refuse(field, "must be a number")
            elif type(value) is not kind:
                self.refuse(field, f"must be of type {kind.__name__}")
