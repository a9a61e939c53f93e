"""Asks a model for scores in this process: ``python -m examples.inference_example [--model MODEL]``.

Without ``--model`` it asks the model of ``examples.train_example``, which is trained first if it is not there.  After
``make demo`` it can ask the champion that the demo promoted::

    ONETRANS_CONFIG=var/demo/onetrans.toml python -m examples.inference_example --model models:/onetrans-ranker@champion
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from examples import train_example
from onetrans.errors import EXIT_OK
from onetrans.process import EXIT_CODES, Parser, exit_code_of
from onetrans.serving import OneTransInferenceEngine

EXAMPLES = f"""examples:
  python -m examples.inference_example
  python -m examples.inference_example --model var/example/model

{EXIT_CODES}"""


def example_request(engine: OneTransInferenceEngine) -> dict[str, Any]:
    """Return a request that fits the model: one that was kept with it, or one of the small shop."""
    kept = engine.source.kept
    if kept is not None:
        return {**kept[0][0], "user_id": "u1"}
    return train_example.request(np.random.default_rng(5), 0)[0]


def main(argv: list[str] | None = None) -> int:
    """Rank the candidates of one request, then score one of them alone."""
    parser = Parser(
        prog="python -m examples.inference_example",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help=f"as for onetrans serve (default: {train_example.FOLDER})")
    arguments = parser.parse_args(argv)
    model = arguments.model or str(train_example.FOLDER)
    if arguments.model is None and not (Path(model) / "model.json").is_file() and (code := train_example.main([])):
        return code

    def ask() -> int:
        engine = OneTransInferenceEngine(model)
        request = example_request(engine)
        print(f"model {engine.source.version}, {len(request['candidates'])} candidates, best first:")
        for item in engine.rank(request)[:5]:
            print(f"  {item['item_id']:<12} ctr {item['ctr']:.4f}  cvr {item['cvr']:.4f}  ctcvr {item['ctcvr']:.4f}")

        first = request["candidates"][0]
        one = engine.single_inference(
            user_features=request["user"],
            item_features=first,
            context_features=request["context"],
            sequence_features=request["sequences"],
            ts=request["ts"],
            user_id=request["user_id"],
        )
        print(f"{first['item_id']} alone: " + ", ".join(f"{task} {value:.4f}" for task, value in one.items()))
        kept = engine.cache.counts
        print(f"past events were encoded {kept.encoded} time(s) and taken from what is kept {kept.equal} time(s)")
        return EXIT_OK

    return exit_code_of(ask)


if __name__ == "__main__":
    sys.exit(main())
