"""Trains a OneTrans in a minute on a small shop made here, and saves it: ``python -m examples.train_example``.

Shows the library without Spark, Airflow and MLflow: a feature schema, requests as plain data, batches, the model, its
two optimizers, AUC, and a saved model that ``examples.inference_example`` and ``onetrans serve --model DIR`` load.

In this shop a visitor looks at one category, clicks what is of it or cheap, and buys what is cheap.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from onetrans.artifact import save_model
from onetrans.batch import RequestBatch
from onetrans.errors import EXIT_OK
from onetrans.metrics import auc
from onetrans.models import RankingModel, build_model, preset
from onetrans.optim import build_optimizers
from onetrans.optim_config import optimizer_preset
from onetrans.process import EXIT_CODES, Parser, exit_code_of
from onetrans.requests import to_batch
from onetrans.schema import FeatureSchema

FOLDER = Path("var/example/model")

EXAMPLES = f"""examples:
  python -m examples.train_example
  python -m examples.train_example --steps 100 --out /tmp/model

{EXIT_CODES}"""

CATEGORIES, ITEMS, USERS = 3, 200, 300
NOW = 1_767_225_600_000_000  # 2026-01-01, in microseconds


def schema() -> FeatureSchema:
    """Return the shop's feature schema; docs/input.md describes the file it would be read from."""
    price = {"kind": "bucketized", "column": "price", "boundaries": [10, 20, 40], "embedding": "price"}
    category = {"kind": "hashed", "column": "category", "hash_size": 64, "embedding": "category"}
    return FeatureSchema.from_dict(
        {
            "name": "example",
            "features": [
                {"name": "user", "side": "user", "kind": "hashed", "column": "user_id", "hash_size": 1000},
                {"name": "hour_of_day", "side": "context", "kind": "hashed", "column": "hour_of_day", "hash_size": 24},
                {"name": "item", "side": "item", "kind": "hashed", "column": "item_id", "hash_size": 1000},
                {"name": "category", "side": "item", **category},
                {"name": "price", "side": "item", **price},
                {"name": "event_category", "side": "event", **category},
                {"name": "event_price", "side": "event", **price},
            ],
            "sequences": [
                {"name": "view", "event": "view", "max_length": 20},
                {"name": "purchase", "event": "purchase", "max_length": 10},
            ],
        }
    )


def request(rng: np.random.Generator, number: int) -> tuple[dict[str, Any], list[int], list[int]]:
    """Return a request as plain data, and what became of its candidates: clicks and conversions."""

    def category(item: int) -> int:
        return item % CATEGORIES

    def price(item: int) -> float:
        return float(5 + 7 * (item % 9))

    def event(item: int, seconds_ago: int) -> dict[str, Any]:
        return {
            "ts": NOW - 1_000_000 * seconds_ago,
            "event_category": f"c{category(item)}",
            "event_price": price(item),
        }

    user = int(rng.integers(USERS))
    wanted = int(rng.integers(CATEGORIES))
    viewed = CATEGORIES * rng.integers(0, ITEMS // CATEGORIES, rng.integers(1, 12)) + wanted
    bought = rng.integers(0, ITEMS, rng.integers(0, 3))
    shown = rng.choice(ITEMS, 10, replace=False)
    liked = [0.1 + 0.5 * (category(int(item)) == wanted) + 0.2 * (price(int(item)) < 30) for item in shown]
    clicks = [int(chance) for chance in rng.random(len(shown)) < liked]
    conversions = [
        int(click and rng.random() < (0.8 if price(int(item)) < 30 else 0.2))
        for click, item in zip(clicks, shown, strict=True)
    ]
    asked = {
        "request_id": f"r{number}",
        "user_id": f"u{user}",
        "ts": NOW,
        "user": {"user": f"u{user}"},
        "context": {"hour_of_day": str(rng.integers(24))},
        "sequences": {
            "view": [event(int(item), 60 * (len(viewed) - n)) for n, item in enumerate(viewed)],
            "purchase": [event(int(item), 90_000 * (len(bought) - n)) for n, item in enumerate(bought)],
        },
        "candidates": [
            {
                "item_id": f"i{item}",
                "item": f"i{item}",
                "category": f"c{category(int(item))}",
                "price": price(int(item)),
            }
            for item in shown
        ],
    }
    return asked, clicks, conversions


def batch(rng: np.random.Generator, requests: int, max_seq_len: int) -> RequestBatch:
    """Return some requests with their outcomes as one packed batch."""
    asked, clicks, conversions = zip(*(request(rng, number) for number in range(requests)), strict=True)
    return replace(
        to_batch(asked, schema(), max_seq_len),
        click_N=torch.tensor(np.concatenate(clicks), dtype=torch.float32),
        conversion_N=torch.tensor(np.concatenate(conversions), dtype=torch.float32),
    )


def train(steps: int, seed: int = 17) -> tuple[RankingModel, dict[str, float]]:
    """Train the smallest model for some steps; return it with its AUC on requests it has not seen."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = build_model(preset("onetrans", "tiny"), schema())
    optimizers = build_optimizers(model, optimizer_preset("tiny"))
    for step in range(1, steps + 1):
        rows = batch(rng, 32, model.config.max_seq_len)
        scores = model(rows)
        click = F.binary_cross_entropy_with_logits(scores.ctr_logit_N, rows.click_N)
        clicked = rows.click_N.bool()
        conversion = F.binary_cross_entropy_with_logits(scores.cvr_logit_N[clicked], rows.conversion_N[clicked])
        optimizers.zero_grad()
        (click + conversion).backward()
        optimizers.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:4d}  click loss {click.item():.3f}  conversion loss {conversion.item():.3f}")
    model.eval()
    rows = batch(rng, 400, model.config.max_seq_len)
    with torch.inference_mode():
        scores = model(rows)
    clicked = rows.click_N.bool()
    return model, {
        "ctr_auc": auc(rows.click_N.numpy(), scores.ctr_logit_N.numpy()),
        "cvr_auc": auc(rows.conversion_N[clicked].numpy(), scores.cvr_logit_N[clicked].numpy()),
    }


def main(argv: list[str] | None = None) -> int:
    """Train, print the figures and save the model."""
    parser = Parser(
        prog="python -m examples.train_example",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder of the model (default: {FOLDER})")
    arguments = parser.parse_args(argv)

    def run() -> int:
        model, figures = train(arguments.steps)
        print("on new requests: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_model(str(arguments.out.resolve()), model, model.schema, model.config, extra=figures)
        print(f"saved to {arguments.out}")
        return EXIT_OK

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
