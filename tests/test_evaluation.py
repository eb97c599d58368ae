"""Arms, controls and what is counted about them."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from mm_c2c import Bridge, SourceInput
from mm_c2c.cache import zeroed
from mm_c2c.evaluation.baselines import Fused, SourceAlone, arms, shuffled, timed
from mm_c2c.evaluation.run import (
    EvaluationConfig,
    evaluate,
    retention,
    split_rows,
    swap_outcomes,
    table,
)
from mm_c2c.evaluation.tasks import Item
from mm_c2c.reference import models


def test_a_timed_answer_is_the_arms_own(bridge: Bridge, pictures: list[Image.Image]) -> None:
    source = bridge.sources[models.SOURCE_NAME]
    answer = timed(SourceAlone(source), bridge, pictures[0], "What?")
    item = SourceInput(text="What?", images=(pictures[0],))
    expected = source.generate([item], max_new_tokens=12, do_sample=False)[0]
    assert answer.answer == expected.strip()
    assert answer.relayed is None
    relay = timed(arms(bridge, source, "Say.")["caption_relay"], bridge, pictures[0], "What?")
    assert relay.relayed is not None
    fused = timed(Fused(bridge), bridge, pictures[0], "What?")
    assert fused.total_ms >= fused.ttft_ms > 0


def test_controls_move_or_empty_every_row(bridge: Bridge, pictures: list[Image.Image]) -> None:
    source = bridge.sources[models.SOURCE_NAME]
    cache = source.prefill([SourceInput(images=(picture,)) for picture in pictures])
    moved = shuffled(cache)
    for before, after in zip(cache.layers, moved.layers, strict=True):
        assert before.keys[1].equal(after.keys[0])
        assert not before.keys[0].equal(after.keys[0])
    assert all(not kv.keys.any() and not kv.values.any() for kv in zeroed(cache).layers)


def test_an_evaluation_counts_every_item_once(
    bridge: Bridge, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    rows = []
    for index in range(5):
        pictures[index % 2].save(tmp_path / f"{index}.png")
        question = {"image": f"{index}.png", "kind": "what", "question": f"What {index}?"}
        rows.append(json.dumps({**question, "answer": "cat"}))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    config = EvaluationConfig(items=tmp_path / "items.jsonl", batch_size=2, timed=1, resamples=20)
    result = evaluate(bridge, config, progress=False)
    assert result["n"] == 5
    assert {name: row["n"] for name, row in result["arms"].items()} == dict.fromkeys(
        ("fused", "blind", "caption_relay", "source", "shuffled", "zeroed"), 5
    )
    # A fuser that was never trained changes nothing: whatever the cache, the answer is the same.
    for item in result["items"]:
        assert item["fused"] == item["shuffled"] == item["zeroed"]
    assert result["time"]["fused"]["n"] == 1
    assert "retention" in table(result)


def test_no_row_is_left_alone_where_it_could_not_be_shuffled() -> None:
    for count in range(1, 40):
        batches = split_rows(count, 4)
        assert [row for rows in batches for row in rows] == list(range(count))
        assert all(len(rows) > 1 for rows in batches) or count == 1


def test_a_swap_counts_where_the_neighbour_asks_alike_and_differs() -> None:
    def item(question: str, answer: str) -> Item:
        return Item(Path("a.png"), "what", question, answer, ("cat", "dog"))

    items = [item("What?", "cat"), item("What?", "dog"), item("What?", "dog"), item("Who?", "cat")]
    answers = {"source": ["cat", "dog", "cat", "cat"], "shuffled": ["Dog.", "dog", "cat", "cat"]}
    counted = swap_outcomes(items, answers, [range(3), range(3, 4)])
    # 0 takes 1's picture and says so; 2 takes 0's and says so; 1 and 2 agree; 3 is alone.
    assert counted["truth"] == {"n": 2, "follow": 1.0, "stay": 0.0, "neither": 0.0}
    assert counted["source_right"] == {"n": 1, "follow": 1.0, "stay": 0.0, "neither": 0.0}
    stubborn = {**answers, "shuffled": ["cat", "dog", "bird", "cat"]}
    counted = swap_outcomes(items, stubborn, [range(3), range(3, 4)])
    assert counted["truth"] == {"n": 2, "follow": 0.0, "stay": 0.5, "neither": 0.5}
    assert math.isnan(swap_outcomes(items, answers, [range(3, 4)])["truth"]["follow"])


@pytest.mark.parametrize(("fused", "kept"), [(0, 0.0), (1, 1 / 3), (3, 1.0)])
def test_retention_is_the_share_of_what_the_source_adds(fused: int, kept: float) -> None:
    def hits(count: int) -> list[bool]:
        return [i < count for i in range(10)]

    right = {"fused": hits(2 + fused), "blind": hits(2), "source": hits(5)}
    assert retention(right, "blind", range(10)) == pytest.approx(kept)
