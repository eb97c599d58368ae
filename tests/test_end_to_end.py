"""The shipped pair, and the README's own code."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mm_c2c import CacheFuser, PatchGrid, SourceInput
from mm_c2c.bridge import WEIGHTS_NAME, BridgeConfig, read_header
from mm_c2c.config import from_dict
from mm_c2c.images import load_image
from mm_c2c.inspection import describe
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


def test_the_shipped_fuser_fits_the_shipped_source_and_is_small() -> None:
    header = read_header(models.BRIDGE_FOLDER)
    config = from_dict(BridgeConfig, header["bridge"])
    (link,) = config.links
    assert link.fuser.source == models.load_source().shape
    assert CacheFuser(link.fuser).num_parameters <= 6_000_000
    assert (models.BRIDGE_FOLDER / WEIGHTS_NAME).stat().st_size <= 24_000_000
    assert "parameters" in describe(str(models.BRIDGE_FOLDER))


def test_the_shipped_evaluation_is_of_the_shipped_items() -> None:
    result = json.loads((models.BRIDGE_FOLDER / "evaluation.json").read_text())
    assert result["n"] >= 1000
    for arm in result["arms"].values():
        low, high = arm["interval"]
        assert low <= arm["accuracy"] <= high
    arms = {name: row["accuracy"] for name, row in result["arms"].items()}
    for floor in ("blind", "zeroed"):
        expected = (arms["fused"] - arms[floor]) / (arms["source"] - arms[floor])
        assert math.isclose(result["retention"][f"over_{floor}"]["value"], expected)


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
