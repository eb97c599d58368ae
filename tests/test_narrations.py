"""What of a reader's sentences about the policy counts as true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_c2c.reference import babyai, narrations
from mm_c2c.reference.metaworld import tasks as metaworld


def test_a_narration_is_taken_apart_and_scored(tmp_path: Path, capsys: Any) -> None:
    truth = "It turns left to put the red ball next to the blue key on its left."
    said = {
        truth: {"move", "intent", "colour", "kind", "side", "all"},
        "it turns right to put the red ball next to the blue key on its left": {
            "intent",
            "colour",
            "kind",
            "side",
        },
        "It turns left to pick up the green key straight ahead.": {"move", "kind"},
        "I cannot tell.": set(),
    }
    rows = [
        {"answers": {"fused": sentence}, "gold": truth, "episode": f"e{number}"}
        for number, sentence in enumerate(said)
    ]
    for row, right in zip(rows, said.values(), strict=True):
        found = narrations.score([row], "fused", narrations.POLICIES["babyai"])
        assert {name for name, (share, _, _) in found.items() if share == 100} == right
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    narrations.main(["babyai", str(tmp_path)])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| 4 sentences | move | intent | colour | kind | side | all |"
    assert table[2].startswith("| fused | 50.0 (0.0 to 100.0) | 50.0")


@pytest.mark.parametrize("task", metaworld.TASKS)
def test_a_narration_of_metaworld_is_taken_apart(task: str) -> None:
    doing = metaworld.TASKS[task].doing
    found = narrations.parts(
        f"The robot is {doing}; the hand moves left and the gripper is closing.",
        narrations.POLICIES["metaworld"],
    )
    assert found == {"task": doing, "motion": "moves left", "gripper": "closing"}


def test_every_true_narration_is_understood_whole() -> None:
    items = (Path(babyai.__file__).parent / "unseen" / "narration.jsonl").read_text().splitlines()
    for line in items:
        found = narrations.parts(json.loads(line)["answer"], narrations.POLICIES["babyai"])
        assert None not in found.values()
