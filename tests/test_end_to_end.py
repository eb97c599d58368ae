"""The shipped pair, and the README's own code."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mm_c2c import CacheFuser, PatchGrid, SourceInput
from mm_c2c.bridge import BridgeConfig
from mm_c2c.cache import PositionKind
from mm_c2c.config import from_dict
from mm_c2c.evaluation.report import brief, set_beside
from mm_c2c.evaluation.tasks import is_right, load_items
from mm_c2c.images import load_image
from mm_c2c.inspection import describe
from mm_c2c.pretrained import WEIGHTS_NAME, read_header
from mm_c2c.reference import models

ROOT = Path(__file__).parent.parent


def test_the_shipped_source_looks_and_speaks_offline() -> None:
    source = models.load_source()
    picture = load_image(ROOT / "demos" / "scene.webp")
    cache = source.prefill([SourceInput(images=(picture,))])
    assert cache.grids == ((PatchGrid(9, 9),),)
    assert all(torch.isfinite(kv.keys).all() for kv in cache.layers)
    asked = SourceInput(text="How many things are there?", images=(picture,))
    answer = source.generate([asked], max_new_tokens=4, do_sample=False)[0]
    assert re.fullmatch(r"\s*\d", answer)


def test_a_question_behind_the_picture_leaves_the_pictures_cache_as_it_is() -> None:
    source = models.load_source()
    picture = load_image(ROOT / "demos" / "scene.webp")
    seen, asked = (
        source.prefill([SourceInput(text=text, images=(picture,))])
        for text in ("", "Where is the dog?")
    )
    here, there = (cache.kinds[0] == PositionKind.IMAGE for cache in (seen, asked))
    assert here.sum() == there.sum() == 81
    for blind, aware in zip(seen.layers, asked.layers, strict=True):
        torch.testing.assert_close(
            blind.keys[:, :, here], aware.keys[:, :, there], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            blind.values[:, :, here], aware.values[:, :, there], rtol=1e-5, atol=1e-5
        )


def test_the_shipped_fuser_fits_the_shipped_source_and_is_small() -> None:
    header = read_header(models.BRIDGE_FOLDER)
    config = from_dict(BridgeConfig, header["bridge"])
    (link,) = config.links
    assert link.fuser.source == models.load_source().shape
    assert CacheFuser(link.fuser).num_parameters <= 6_000_000
    assert (models.BRIDGE_FOLDER / WEIGHTS_NAME).stat().st_size <= 24_000_000
    assert "parameters" in describe(str(models.BRIDGE_FOLDER))


def test_the_shipped_evaluation_is_of_the_shipped_items() -> None:
    run = models.BRIDGE_FOLDER / "evaluation"
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    items = load_items(models.HERE / "unseen_style" / "items.jsonl")
    asked = Counter((row["image"], row["question"], row["gold"]) for row in rows)
    assert asked == Counter((item.image.name, item.question, item.answer) for item in items)
    summary = json.loads((run / "summary.json").read_text())
    for name, arm in summary["arms"].items():
        right = sum(is_right(row["answers"][name], row["gold"]) for row in rows)
        assert math.isclose(arm["accuracy"][0], right / len(rows))


def test_the_readme_shows_the_shipped_evaluation() -> None:
    free, choice = (
        json.loads((models.BRIDGE_FOLDER / folder / "summary.json").read_text())
        for folder in ("evaluation", "evaluation_choice")
    )
    assert brief(set_beside(free, choice)) in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.network
def test_the_readme_code_runs() -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    run = subprocess.run(
        [sys.executable, "-c", block[1]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 3
