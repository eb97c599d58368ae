"""What an arm's answer depends on: all that the arm is for, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from arm_rigs import aligned_bridge, make_file, open_up
from PIL import Image

from mm_c2c import Bridge, SourceInput
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation import arms
from mm_c2c.evaluation.arms import ARMS, FILES, Asked, Setting, build_arm
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.sources.text import encode_chats

# Beside the question. In the tiny source's prompt the picture stands before the instruction, so
# that its slots tell nothing of that.
DEPENDS_ON: dict[str, set[str]] = {
    "fused": {"picture"},
    "fused_aligned": {"picture", "instruction"},
    "prefix_only": {"picture"},
    "fused_and_caption": {"picture", "instruction"},
    "blind": set(),
    "caption_relay": {"picture", "instruction"},
    "caption_relay_options": {"picture", "instruction", "options"},
    "question_aware_relay": {"picture", "instruction", "options"},
    "tuned_relay": {"picture", "instruction"},
    "soft_prompt": {"picture"},
    "answer_relay": {"picture", "instruction"},
    "instruction_only": {"instruction"},
    "instruction_only_options": {"instruction", "options"},
    "true_description": {"description"},
    "true_description_options": {"description", "options"},
    "description_and_instruction": {"description", "instruction"},
    "description_and_instruction_options": {"description", "instruction", "options"},
    "tuned_description": {"description", "instruction"},
    "source": {"picture", "instruction"},
    "shuffled": {"other"},
    "zeroed": set(),
    "own_source": set(),
}
SHOWN = "The picture shows: {words}\n{question}"
CHOICES = "\nAnswer with one of: {options}."
GREEDY = {"max_new_tokens": 6, "do_sample": False}
# What the target was shown, and the words after it.
PROMPTS = {
    "fused": ("look", "{question}"),
    "fused_and_caption": ("look", SHOWN),
    "blind": (None, "{question}"),
    "caption_relay": (None, SHOWN),
    "caption_relay_options": (None, SHOWN + CHOICES),
    "question_aware_relay": (None, SHOWN + "\nChoose: {options}."),
    "answer_relay": (None, "Somebody who sees the picture answers: {words}\n{question}"),
    "instruction_only": (None, "The robot was told: {words}\n{question}"),
    "instruction_only_options": (None, "The robot was told: {words}\n{question}" + CHOICES),
    "true_description_options": (None, SHOWN + CHOICES),
    "description_and_instruction_options": (None, SHOWN + CHOICES),
    "shuffled": ("other", "{question}"),
}


@pytest.fixture
def setting(arm: str, bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """An open fuser, and the file that the arm wants."""
    monkeypatch.setattr(arms, "CAPTION_TOKENS", 8)
    open_up(bridge.fusers)
    files = {FILES[arm]: make_file(arm, bridge, tmp_path)} if arm in FILES else {}
    return Setting(
        bridge=bridge,
        source_name=SOURCE_NAME,
        request="Say.",
        answer_tokens=GREEDY["max_new_tokens"],
        **files,
    )


@pytest.fixture
def rows(pictures: list[Image.Image]) -> dict[str, Asked]:
    """A question, and others that differ from it in one respect each."""
    one, two = pictures

    def look(picture: Image.Image, text: str = "go .") -> SourceInput:
        return SourceInput(text=text, images=(picture,))

    first = Asked(look(one), "What?", ("cat", "dog"), "a cat.", look(one, "see ."))
    return {
        "nothing": first,
        "question": first._replace(question="Where is the cat?"),
        "picture": first._replace(look=look(two)),
        "instruction": first._replace(look=look(one, "stop .")),
        "options": first._replace(options=("cat", "hat")),
        "description": first._replace(description="a red dog."),
        "other": first._replace(other=look(two, "see .")),
    }


@pytest.mark.parametrize("arm", [name for name in ARMS if name != "action_only"])
def test_an_answer_depends_on_what_the_arm_reads_and_on_its_own_row(
    arm: str, setting: Setting, rows: dict[str, Asked]
) -> None:
    built = build_arm(arm, setting)
    replies = dict(zip(rows, built.answer([*rows.values()]), strict=True))
    answers = {what: reply.answer for what, reply in replies.items()}
    differing = {what for what, answer in answers.items() if answer != answers["nothing"]}
    assert differing == DEPENDS_ON[arm] | {"question"}
    for what in ("nothing", "question"):  # of unlike lengths
        assert built.answer([rows[what]]) == [replies[what]]


@pytest.mark.parametrize("arm", PROMPTS)
def test_the_target_reads_what_was_seen_and_the_arms_own_words(
    arm: str, setting: Setting, rows: dict[str, Asked]
) -> None:
    asked = [*rows.values()]
    replies = build_arm(arm, setting).answer(asked)
    seen, wording = PROMPTS[arm]
    prompts = [
        wording.format(words=reply.relayed, question=row.question, options=", ".join(row.options))
        for reply, row in zip(replies, asked, strict=True)
    ]
    bridge = setting.bridge
    if seen:
        looks = [getattr(row, seen) for row in asked]
        said = bridge.generate(bridge.perceive(looks), prompts, **GREEDY)
    else:
        encoded, _ = encode_chats(bridge.target.tokenizer, prompts, bridge.device)
        out = bridge.target.model.generate(**encoded, **GREEDY)
        start = encoded["input_ids"].shape[1]
        said = bridge.target.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
    assert [reply.answer for reply in replies] == [text.strip() for text in said]


@pytest.mark.parametrize(
    ("arm", "reads"), [("fused", {"picture"}), ("shuffled", {"other"}), ("zeroed", set())]
)
def test_words_that_the_source_reads_too_tell_what_the_arm_is_for(
    arm: str, reads: set[str], setting: Setting, rows: dict[str, Asked]
) -> None:
    built = build_arm(arm, replace(setting, bridge=aligned_bridge(setting.bridge)))
    answers = dict(zip(rows, built.answer([*rows.values()]), strict=True))
    differing = {what for what, answer in answers.items() if answer != answers["nothing"]}
    assert differing == reads | {"question", "instruction"}


@pytest.mark.parametrize("arm", ["fused_aligned"])
def test_a_fuser_of_aligned_words_beside_the_slots_answers_as_its_own_bridge(
    setting: Setting, rows: dict[str, Asked], tmp_path: Path
) -> None:
    asked = [*rows.values()]
    own = replace(setting, bridge=aligned_bridge(setting.bridge))
    said = build_arm("fused_aligned", setting).answer(asked)
    assert said == build_arm("fused", own).answer(asked)
    assert said != build_arm("fused", setting).answer(asked)
    setting.bridge.save_pretrained(tmp_path / "slots")
    wrong = replace(setting, aligned_bridge=tmp_path / "slots")
    with pytest.raises(ConfigError, match=f"links are all aligned, .* the slots of {SOURCE_NAME}"):
        build_arm("fused_aligned", wrong).answer(asked)
