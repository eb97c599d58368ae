"""The command line: ask, fetch, inspect, train, evaluate, prompts, diagnose, bench, card, demo."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_c2c.errors import InputError, MMC2CError, UnsupportedError

if TYPE_CHECKING:
    from transformers import TextStreamer

    from mm_c2c.bridge import Bridge

ASK_ARMS = ("fused", "blind", "caption_relay", "source")
QUICK_ITEMS = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes no more `key=value` once an option has come between.
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if late != rest or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
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
    ask.add_argument("--only", choices=ASK_ARMS, help="run this arm alone")
    ask.add_argument("--stream", action="store_true", help="print the answer as it is made")
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    ask.add_argument("--tiny", action="store_true", help="a target of random weights: no download")
    ask.add_argument("--device", default="cpu", help="where to compute, such as cuda")
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

    train = commands.add_parser(
        "train", help="train a fuser; `accelerate launch` for many processes"
    )
    train.add_argument("config", type=Path, help="YAML, such as those of configs/")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optimizer.learning_rate=1e-3"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="three steps on random weights, and what it costs"
    )
    train.add_argument("--true-width", action="store_true", help="with --dry-run: not narrowed")
    train.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="accuracy of every arm and control")
    evaluate.add_argument("--quick", action="store_true", help=f"{QUICK_ITEMS} items only")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of tables")
    evaluate.add_argument("--out", type=Path, help="folder for all answers and the report")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="[CONFIG] key=value",
        help="YAML, such as configs/evaluation.yaml, or the shipped scenes; and such as items=FILE",
    )
    evaluate.set_defaults(run=_evaluate)

    prompts = commands.add_parser("prompts", help="find the words a caption relay does best with")
    prompts.add_argument("--json", action="store_true", help="print JSON instead of a table")
    prompts.add_argument("--out", type=Path, help="also write the JSON here, for `evaluate`")
    prompts.add_argument(
        "overrides", nargs="+", metavar="key=value", help="items=FILE, of the training split"
    )
    prompts.set_defaults(run=_prompts)

    diagnose = commands.add_parser("diagnose", help="accuracy with parts of the fuser switched off")
    diagnose.add_argument("--json", action="store_true", help="print JSON instead of tables")
    diagnose.add_argument("--out", type=Path, help="folder for all answers and a report with plots")
    diagnose.add_argument("overrides", nargs="*", metavar="key=value", help="such as limit=70")
    diagnose.set_defaults(run=_diagnose)

    bench = commands.add_parser("bench", help="speed of fusing, beside the paper's projector")
    bench.add_argument("--json", action="store_true", help="print JSON instead of tables")
    bench.add_argument("overrides", nargs="*", metavar="key=value", help="such as positions=128")
    bench.set_defaults(run=_bench)

    card = commands.add_parser("card", help="write a saved bridge's model card, for the Hub")
    card.add_argument("folder", type=Path, help="of the saved bridge")
    card.add_argument("--evaluation", type=Path, help="folder of a run of `evaluate`")
    card.add_argument("--licence", help="of the weights, such as apache-2.0")
    card.add_argument("--name", help="of the repository, user/name")
    card.set_defaults(run=_card)

    demo = commands.add_parser("demo", help="a page in the browser, on this machine alone")
    demo.add_argument("--tiny", action="store_true", help="a target of random weights: no download")
    demo.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    demo.add_argument("--port", type=int, help="the first free one from 7860 when left out")
    demo.add_argument("--host", help="address to listen on; this machine alone when left out")
    demo.add_argument("--share", action="store_true", help="a public link, through Gradio's server")
    demo.add_argument("--auth", metavar="USER:PASSWORD", help="the login for --host and --share")
    demo.add_argument(
        "--own-pair",
        action="store_true",
        help="let visitors load models of their own also where others than you can visit",
    )
    demo.set_defaults(run=_demo)
    return parser


def _make_folder(path: Path) -> None:
    """The folder of results, made before what would be lost without it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot make the folder {path}: {error.strerror}") from error


def _ask(args: argparse.Namespace) -> None:
    from mm_c2c.demo.pair import load_tiny_bridge
    from mm_c2c.evaluation.arms import Asked, Setting, build_arm
    from mm_c2c.evaluation.clock import timed
    from mm_c2c.evaluation.pair import PairConfig, load_pair
    from mm_c2c.images import load_image
    from mm_c2c.reference.models import SOURCE_NAME
    from mm_c2c.reference.scenes import CAPTION_REQUEST
    from mm_c2c.sources import SourceInput

    if not args.question.strip():
        raise InputError("the question is empty; ask something")
    if args.stream and (args.json or not args.only):
        raise InputError("--stream goes with --only ARM and without --json")
    picture = load_image(args.image)
    bridge = load_tiny_bridge() if args.tiny else load_pair(PairConfig(device=args.device))
    setting = Setting(bridge=bridge, source_name=SOURCE_NAME, request=CAPTION_REQUEST)
    asked = Asked(SourceInput(images=(picture,)), args.question)
    if args.stream:
        build_arm(args.only, setting).answer([asked], _printer(bridge, args.only))
        return
    named = {name: build_arm(name, setting) for name in ([args.only] if args.only else ASK_ARMS)}
    for arm in named.values():
        timed(arm, bridge, asked)  # a warm-up, so that times compare
    answers = {name: timed(arm, bridge, asked) for name, arm in named.items()}
    if args.json:
        report: dict[str, Any] = {
            "question": args.question,
            "arms": {
                name: {key: value for key, value in answer._asdict().items() if value is not None}
                for name, answer in answers.items()
            },
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
    from mm_c2c.reference.fetch import check_target, target_path

    print(check_target(target_path()))


def _inspect(args: argparse.Namespace) -> None:
    from mm_c2c.inspection import describe, describe_pair, pair_report

    if bool(args.what) == bool(args.pair) or (args.json and not args.pair):
        raise InputError("inspect takes WHAT, or --pair SOURCE TARGET and with it --json")
    if args.what:
        print(describe(args.what))
        return
    report = pair_report(*args.pair)
    print(json.dumps(report) if args.json else describe_pair(report))


def _train(args: argparse.Namespace) -> None:
    from mm_c2c.config import load_config
    from mm_c2c.training.config import TrainingConfig
    from mm_c2c.training.run import train

    if (args.true_width or args.json) and not args.dry_run:
        raise InputError("--true-width and --json go with --dry-run")
    config = load_config(TrainingConfig, args.config, args.overrides)
    if not args.dry_run:
        train(config)
        return
    from mm_c2c.training.dry_run import dry_run, text_table

    result = dry_run(config, true_width=args.true_width)
    print(json.dumps(result) if args.json else text_table(result))


def _evaluate(args: argparse.Namespace) -> None:
    from mm_c2c.config import load_config, override
    from mm_c2c.evaluation.arms import FILES
    from mm_c2c.evaluation.pair import load_pair
    from mm_c2c.evaluation.render import new_figure
    from mm_c2c.evaluation.report import text_table, write_report
    from mm_c2c.evaluation.run import EvaluationConfig, evaluate, reference_config

    has_file = bool(args.overrides) and "=" not in args.overrides[0]
    overrides = [f"limit={QUICK_ITEMS}"] * args.quick + args.overrides[has_file:]
    if has_file:
        start = load_config(EvaluationConfig, Path(args.overrides[0]))
    else:
        start = reference_config()
    config = override(start, overrides)
    if not has_file and config.bridge is not None:
        # What ships beside the bridge is the reference pair's.
        none: dict[str, Any] = dict.fromkeys(FILES.values())
        config = override(replace(start, **none), overrides)
    if args.out:
        _make_folder(args.out)
        new_figure(1, 1)  # the report needs it: better known now than after all questions
    summary = evaluate(load_pair(config), config, args.out)
    if args.out:
        write_report(args.out)
    if args.json:
        print(json.dumps(summary))
    else:
        print(text_table(summary))


def _prompts(args: argparse.Namespace) -> None:
    from mm_c2c.config import parse_overrides
    from mm_c2c.evaluation.pair import load_pair
    from mm_c2c.evaluation.prompt_search import PromptSearchConfig, search_prompts, text_table
    from mm_c2c.run_folder import make_room

    config = parse_overrides(PromptSearchConfig, args.overrides)
    if args.out:
        make_room(args.out)
    result = search_prompts(load_pair(config), config, args.out)
    print(json.dumps(result) if args.json else text_table(result))


def _diagnose(args: argparse.Namespace) -> None:
    from mm_c2c.config import override
    from mm_c2c.evaluation.diagnosis_report import look, write_report
    from mm_c2c.evaluation.diagnostics import DiagnosticsConfig, diagnose, text_table
    from mm_c2c.evaluation.pair import load_pair
    from mm_c2c.evaluation.render import new_figure
    from mm_c2c.reference.models import HERE

    if args.out:
        _make_folder(args.out)
        new_figure(1, 1)  # the report needs it: better known now than after all questions
    config = DiagnosticsConfig(items=HERE / "unseen_style" / "items.jsonl")
    config = override(config, args.overrides)
    bridge = load_pair(config)
    result = diagnose(bridge, config, args.out)
    if args.out:
        write_report(result, look(bridge, config), args.out)
    print(json.dumps(result) if args.json else text_table(result))


def _bench(args: argparse.Namespace) -> None:
    from mm_c2c.bench.run import BenchConfig, bench, text_table
    from mm_c2c.config import override

    result = bench(override(BenchConfig(), args.overrides))
    print(json.dumps(result) if args.json else text_table(result))


def _card(args: argparse.Namespace) -> None:
    from mm_c2c.evaluation.card import write_card
    from mm_c2c.hub import CARD_NAME

    write_card(args.folder, args.evaluation, licence=args.licence, name=args.name)
    print(args.folder / CARD_NAME)


def _demo(args: argparse.Namespace) -> None:
    from mm_c2c.demo.pair import load_tiny_bridge, reference_setting
    from mm_c2c.evaluation.pair import PairConfig, load_pair

    try:
        from mm_c2c.demo.page import build_page
        from mm_c2c.demo.robot import load_show
        from mm_c2c.demo.serve import Exposure, check_port, launch, warm_up
    except ImportError as error:
        raise UnsupportedError(
            f'the page needs Gradio ({error}): pip install "mm-c2c[demo]"'
        ) from error
    exposure = Exposure.from_environment(
        host=args.host, port=args.port, share=args.share, auth=args.auth
    )
    check_port(exposure)
    setting = reference_setting(
        load_tiny_bridge() if args.tiny else load_pair(PairConfig(device=args.device))
    )
    warm_up(setting)
    notice = "**Tiny**: this target has random weights; what it says means nothing."
    page = build_page(
        setting,
        show=load_show(tiny=args.tiny),
        notice=notice if args.tiny else "",
        own_pair=args.own_pair or exposure.is_private,
    )
    launch(page, exposure)


if __name__ == "__main__":
    sys.exit(main())
