"""Write one split's pictures and questions to a folder, as `mm-c2c evaluate` reads them.

python -m mm_c2c.reference.make_items --split unseen_style --out FOLDER --artwork FOLDER

`--stickers 5 6` makes scenes of so many, in turn; `--kinds odd` asks questions of this kind alone.
`--knowledge` writes `knowledge.jsonl` instead, about the pictures that are there, of what training
never asks; with `--taught` it writes `taught.jsonl`, of what training asks.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from mm_c2c.errors import run_main
from mm_c2c.reference.knowledge import FACTS, knowledge_questions
from mm_c2c.reference.scene_data import SPLITS, Artworks, load_artworks, make_scene
from mm_c2c.reference.scenes import CELLS, KINDS, caption, questions, render

WEBP_QUALITY = 92


def main() -> None:
    """Take scenes in order until every kind of question has its share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--per-kind", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--artwork", type=Path, required=True)
    parser.add_argument("--stickers", type=int, nargs="+", choices=range(1, CELLS**2 + 1))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--knowledge", action="store_true")
    parser.add_argument("--taught", action="store_true")
    args = parser.parse_args()
    if args.taught and not args.knowledge:
        parser.error("--taught goes with --knowledge")
    artworks = load_artworks(args.split, args.artwork)
    if args.knowledge:
        write_knowledge(args.split, args.out, args.per_kind, artworks, taught=args.taught)
        return
    names = sorted(set.intersection(*(set(drawn) for drawn in artworks.values())))
    names = [name for name in names if name in SPLITS[args.split].names]
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SPLITS[args.split].first_seed)
    wanted = dict.fromkeys(args.kinds, args.per_kind)
    rows, number = [], 0
    while any(wanted.values()):
        stickers = args.stickers and args.stickers[number % len(args.stickers)]
        scene = make_scene(args.split, number, artworks, stickers)
        asked = [q for q in questions(scene, rng, names) if wanted.get(q.kind)]
        if asked:
            file = f"{number:04d}.webp"
            render(scene, artworks).save(args.out / file, quality=WEBP_QUALITY, method=6)
            for question in asked:
                wanted[question.kind] -= 1
                rows.append({"image": file, **question._asdict(), "caption": caption(scene)})
        number += 1
    _write(args.out / "items.jsonl", rows)


def write_knowledge(
    split: str, out: Path, per_kind: int, artworks: Artworks, *, taught: bool = False
) -> None:
    """Questions about the pictures in a folder, `yes` as often as `no`, as far as they go."""
    rng = random.Random(SPLITS[split].first_seed)
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for path in sorted(out.glob("*.webp")):
        scene = make_scene(split, int(path.stem), artworks)
        for question in knowledge_questions(scene, taught=taught):
            row = {"image": path.name, **question._asdict(), "caption": caption(scene)}
            found.setdefault((question.kind, question.answer), []).append(row)
    rows = []
    for kind in FACTS:
        count = min(per_kind // 2, *(len(found[kind, answer]) for answer in ("yes", "no")))
        for answer in ("yes", "no"):
            rows += rng.sample(found[kind, answer], count)
    file = "taught.jsonl" if taught else "knowledge.jsonl"
    _write(out / file, sorted(rows, key=lambda row: (row["image"], row["question"])))


def _write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
