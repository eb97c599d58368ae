"""Write one split's pictures and questions to a folder, as `mm-c2c evaluate` reads them.

python -m mm_c2c.reference.make_items --split unseen_style --out FOLDER --artwork FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from mm_c2c.reference.scene_data import SPLITS, load_artworks, make_scene
from mm_c2c.reference.scenes import KINDS, caption, questions, render

WEBP_QUALITY = 92


def main() -> None:
    """Take scenes in order until every kind of question has its share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--per-kind", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--artwork", type=Path, required=True)
    args = parser.parse_args()
    artworks = load_artworks(args.split, args.artwork)
    names = sorted(set.intersection(*(set(drawn) for drawn in artworks.values())))
    names = [name for name in names if name in SPLITS[args.split].names]
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SPLITS[args.split].first_seed)
    wanted = dict.fromkeys(KINDS, args.per_kind)
    rows, number = [], 0
    while any(wanted.values()):
        scene = make_scene(args.split, number, artworks)
        asked = [q for q in questions(scene, rng, names) if wanted[q.kind]]
        if asked:
            file = f"{number:04d}.webp"
            render(scene, artworks).save(args.out / file, quality=WEBP_QUALITY, method=6)
            for question in asked:
                wanted[question.kind] -= 1
                rows.append({"image": file, **question._asdict(), "caption": caption(scene)})
        number += 1
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (args.out / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
