"""The command line: mm-c2c ask | fetch | inspect | evaluate."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_c2c.errors import InputError, MMC2CError

if TYPE_CHECKING:
    from transformers import TextStreamer

    from mm_c2c.bridge import Bridge

ARM_NAMES = ("fused", "blind", "caption_relay", "source")
QUICK_ITEMS = 140


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mm_c2c").setLevel(logging.INFO)
    warnings.simplefilter("ignore")
    try:
        args.run(args)
    except MMC2CError as error:
        print(f"mm-c2c: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mm-c2c", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="ask about a picture, all arms side by side")
    ask.add_argument("question")
    ask.add_argument("--image", type=Path, required=True, help="a picture file")
    ask.add_argument("--only", choices=ARM_NAMES, help="run this arm alone")
    ask.add_argument("--stream", action="store_true", help="print the answer as it is made")
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    ask.set_defaults(run=_ask)

    fetch = commands.add_parser("fetch", help="download the target's weights, once")
    fetch.set_defaults(run=_fetch)

    inspect = commands.add_parser("inspect", help="describe a fuser, a cache, a model or a pair")
    inspect.add_argument(
        "what", nargs="?", help="a saved bridge, a cache file, or a model's folder or Hub id"
    )
    inspect.add_argument(
        "--pair",
        nargs=2,
        metavar=("SOURCE", "TARGET"),
        help="two models: what a fuser between them costs",
    )
    inspect.add_argument("--json", action="store_true", help="with --pair: print one JSON object")
    inspect.set_defaults(run=_inspect)

    evaluate = commands.add_parser("evaluate", help="accuracy of every arm and control")
    evaluate.add_argument("--config", type=Path, help="YAML; the shipped scenes when left out")
    evaluate.add_argument("--quick", action="store_true", help=f"{QUICK_ITEMS} items only")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of tables")
    evaluate.add_argument("--out", type=Path, help="also write the JSON, with all answers, here")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="such as items=FILE")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _load_bridge() -> Bridge:
    """The reference bridge, without transformers' bars for loads that take a second."""
    from transformers.utils import logging as transformers_logging

    from mm_c2c.reference import models

    transformers_logging.disable_progress_bar()
    return models.load_bridge()


def _ask(args: argparse.Namespace) -> None:
    from mm_c2c.evaluation.baselines import arms, timed
    from mm_c2c.images import load_image
    from mm_c2c.reference.models import SOURCE_NAME
    from mm_c2c.reference.scenes import CAPTION_REQUEST

    if not args.question.strip():
        raise InputError("the question is empty; ask something")
    if args.stream and (args.json or not args.only):
        raise InputError("--stream goes with --only ARM and without --json")
    picture = load_image(args.image)
    bridge = _load_bridge()
    named = arms(bridge, bridge.sources[SOURCE_NAME], CAPTION_REQUEST)
    if args.only:
        named = {args.only: named[args.only]}
    if args.stream:
        printer = _printer(bridge, args.only)
        named[args.only].answer(picture, args.question, printer)
        return
    for arm in named.values():
        timed(arm, bridge, picture, args.question)  # a warm-up, so that times compare
    answers = {n: timed(arm, bridge, picture, args.question) for n, arm in named.items()}
    if args.json:
        report: dict[str, Any] = {
            "question": args.question,
            "arms": {name: answer._asdict() for name, answer in answers.items()},
        }
        print(json.dumps(report, ensure_ascii=False))
        return
    for name, answer in answers.items():
        print(
            f"{name:<14} {answer.answer!r:<40} first token {answer.ttft_ms:6.0f} ms, "
            f"total {answer.total_ms:6.0f} ms, {answer.tokens} tokens"
        )
        if answer.relayed is not None:
            print(f"{'':<14} caption: {answer.relayed}")


def _printer(bridge: Bridge, arm: str) -> TextStreamer:
    """Prints an answer as it is made; the source has a tokenizer of its own."""
    from transformers import TextStreamer

    from mm_c2c.reference.models import SOURCE_NAME

    source: Any = bridge.sources[SOURCE_NAME]
    tokenizer = source.processor.tokenizer if arm == "source" else bridge.target.tokenizer
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _fetch(args: argparse.Namespace) -> None:
    from mm_c2c.reference.fetch import target_path

    print(target_path())


def _inspect(args: argparse.Namespace) -> None:
    from mm_c2c.inspection import describe, describe_pair, pair_report

    if bool(args.what) == bool(args.pair) or (args.json and not args.pair):
        raise InputError("inspect takes WHAT, or --pair SOURCE TARGET and with it --json")
    if args.what:
        print(describe(args.what))
        return
    report = pair_report(*args.pair)
    print(json.dumps(report) if args.json else describe_pair(report))


def _evaluate(args: argparse.Namespace) -> None:
    from mm_c2c.config import load_config, override, to_dict
    from mm_c2c.evaluation.run import EvaluationConfig, evaluate, table
    from mm_c2c.reference.models import HERE

    if args.config:
        config = load_config(EvaluationConfig, args.config)
    else:
        config = EvaluationConfig(items=HERE / "unseen_style" / "items.jsonl")
    quick = [f"limit={QUICK_ITEMS}"] if args.quick else []
    config = override(config, [*quick, *args.overrides])
    result = evaluate(_load_bridge(), config)
    # Folder and name: a result is read on other machines.
    items = "/".join(config.items.parts[-2:])
    result["config"] = {**to_dict(config), "items": items}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    if args.json:
        print(json.dumps({k: v for k, v in result.items() if k != "items"}))
    else:
        print(table(result))


if __name__ == "__main__":
    sys.exit(main())
