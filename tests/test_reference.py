"""Sticker scenes, their truth, the tower and the shipped items."""

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from mm_c2c.errors import FetchError, InputError
from mm_c2c.evaluation.tasks import is_right, is_right_in_a_sentence, load_items, normalise
from mm_c2c.reference import make_items, models
from mm_c2c.reference.concepts import CONCEPTS, GROUPS
from mm_c2c.reference.knowledge import FACTS, draw_knowledge
from mm_c2c.reference.scene_data import SPLITS
from mm_c2c.reference.scenes import (
    KINDS,
    Scene,
    Sticker,
    caption,
    odd_one_out,
    questions,
    render,
    sample_scene,
)
from mm_c2c.reference.stickers import DEV_STYLE, TEST_STYLE, TRAIN_STYLES
from mm_c2c.reference.tower import EfficientNetLite0, GridTower, GridTowerConfig

NAMES = SPLITS["train"].names
STYLES = {name: ["plain"] for name in NAMES}
ARTWORK = {"plain": {name: Image.new("RGBA", (20, 16), "red") for name in NAMES}}


def sticker(name: str, row: int, col: int) -> Sticker:
    return Sticker(
        name=name,
        style="plain",
        row=row,
        col=col,
        x=0.2 + 0.3 * col,
        y=0.2 + 0.3 * row,
        size=0.2,
        angle=0.0,
    )


def test_concepts_are_distinct_and_grouped() -> None:
    assert len({c.name for c in CONCEPTS}) == len({c.code for c in CONCEPTS}) == len(CONCEPTS)
    assert {c.group for c in CONCEPTS if not c.heldout} == set(GROUPS)


def test_no_style_or_concept_of_a_test_split_is_trained_on() -> None:
    assert {DEV_STYLE, TEST_STYLE}.isdisjoint(TRAIN_STYLES)
    assert set(SPLITS["unseen_concept"].names).isdisjoint(NAMES)


def test_items_can_show_more_stickers_than_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_items, "load_artworks", lambda split, folder: ARTWORK)
    arguments = ["--split", "unseen_style", "--per-kind", "2", "--stickers", "5", "6"]
    folders = ["--out", str(tmp_path), "--artwork", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["make_items", *arguments, *folders])
    make_items.main()
    items = load_items(tmp_path / "items.jsonl")
    assert Counter(item.kind for item in items) == dict.fromkeys(KINDS, 2)
    described = [item.description for item in items]
    assert {len(text.split(",")) for text in described if text} == {5, 6}


def test_what_training_asks_lies_beside_what_it_never_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_items, "load_artworks", lambda split, folder: ARTWORK)
    arguments = ["x", "--split", "train", "--out", str(tmp_path), "--artwork", str(tmp_path)]
    asked = {}
    for extra in (["--per-kind", "12"], ["--knowledge"], ["--knowledge", "--taught"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *extra])
        make_items.main()
    for name in ("knowledge", "taught"):
        items = load_items(tmp_path / f"{name}.jsonl")
        asked[name] = {(item.image.name, item.question) for item in items}
        assert {item.kind for item in items} == set(FACTS)
    assert asked["knowledge"].isdisjoint(asked["taught"])
    monkeypatch.setattr(sys, "argv", [*arguments, "--taught"])
    with pytest.raises(SystemExit):
        make_items.main()
    assert "--taught goes with --knowledge" in capsys.readouterr().err


def test_a_scene_is_the_same_for_the_same_seed() -> None:
    first, second = (sample_scene(random.Random(7), NAMES, STYLES) for _ in range(2))
    assert first == second
    assert render(first, ARTWORK).tobytes() == render(second, ARTWORK).tobytes()


def test_stickers_share_no_cell_and_stand_in_reading_order() -> None:
    for seed in range(50):
        scene = sample_scene(random.Random(seed), NAMES, STYLES)
        cells = [(s.row, s.col) for s in scene.stickers]
        assert cells == sorted(set(cells))


def test_every_answer_is_true() -> None:
    scene = Scene((sticker("dog", 0, 0), sticker("apple", 1, 2), sticker("cat", 2, 1)), 0)
    assert odd_one_out(scene) == "apple"
    assert caption(scene) == ("a dog in the top left, an apple on the right, a cat at the bottom.")
    truth = {
        "What is in the top left?": "dog",
        "What kind of thing is on the right?": "food",
        "Where is the cat?": "bottom",
        "How many things are there?": "3",
        "How many animals are there?": "2",
        "How many tools are there?": "0",
        "Is there a cat?": "yes",
        "Is there a car?": "no",
        "What is above the apple?": "dog",
        "What is right of the cat?": "apple",
        "Which is the odd one out?": "apple",
    }
    asked = {}
    for seed in range(300):
        asked |= {q.question: q.answer for q in questions(scene, random.Random(seed), NAMES)}
    assert truth.items() <= asked.items()
    assert "What is left of the apple?" not in asked  # two are


def test_yes_and_no_are_asked_as_often() -> None:
    rng = random.Random(0)
    answers = Counter(
        q.answer
        for _ in range(400)
        for q in questions(sample_scene(rng, NAMES, STYLES), rng, NAMES)
        if q.kind == "exists"
    )
    assert abs(answers["yes"] - answers["no"]) < 80


def test_the_tower_gives_one_row_of_channels_a_patch() -> None:
    tower = GridTower(GridTowerConfig(image_size=64, hidden_size=24, num_attention_heads=2)).eval()
    pixels = torch.zeros(2, 3, 64, 64)
    assert tower(pixels).last_hidden_state.shape == (2, 4, 24)
    torch.testing.assert_close(
        tower(pixels).last_hidden_state, tower.encode(tower.features(pixels))
    )


def test_the_convolutions_pad_as_tensorflow_does() -> None:
    net = EfficientNetLite0()
    torch.nn.init.ones_(net.stem.weight)
    torch.nn.init.zeros_(net.stem.bias)
    out = net.stem(torch.ones(1, 3, 4, 4))
    assert out.shape[-2:] == (2, 2)
    assert out[0, 0].tolist() == [[27.0, 18.0], [18.0, 12.0]]  # padded right and below only


def test_the_shipped_items_hold_every_kind_and_their_pictures() -> None:
    items = load_items(models.HERE / "unseen_style" / "items.jsonl")
    assert len(items) >= 1000
    assert {item.kind for item in items} == set(KINDS)
    assert all(item.image.is_file() for item in items)


@pytest.mark.parametrize(
    ("said", "exact", "wordy"),
    [
        ("top left", True, True),
        ("The Top Left.", True, True),
        ("It is in the top left of the picture", False, True),
        ("top", False, False),
        ("top left or bottom", False, False),
    ],
)
def test_answers_are_scored_fairly(said: str, exact: bool, wordy: bool) -> None:
    items = load_items(models.HERE / "unseen_style" / "items.jsonl")
    item = next(i for i in items if i.answer == "top left")
    assert is_right(said, item.answer) == exact
    assert is_right_in_a_sentence(said, item.answer, item.options) == wordy


def test_numbers_count_in_words_and_digits() -> None:
    assert normalise("Three!") == normalise("3")


def test_a_damaged_item_file_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(InputError, match="line 1"):
        load_items(tmp_path / "items.jsonl")


def test_the_shipped_knowledge_items_are_balanced_and_true() -> None:
    items = load_items(models.HERE / "unseen_style" / "knowledge.jsonl")
    counts = Counter((item.kind, item.answer) for item in items)
    assert {kind for kind, _ in counts} == set(FACTS)
    assert all(counts[kind, "yes"] == counts[kind, "no"] for kind in FACTS)
    for item in items:
        place = re.search(r"the thing (.*?)(?: alive| fly| have wheels)?\?$", item.question)
        assert place is not None
        (name,) = re.findall(rf"(?:^|, )(?:an? )?(\w+) {place[1]}[,.]", item.description or "")
        assert name in FACTS[item.kind].names(item.answer, taught=False)


def test_no_fact_is_both_true_and_false() -> None:
    for fact in FACTS.values():
        assert not fact.true_of & fact.false_of
        assert fact.true_of | fact.false_of <= {concept.name for concept in CONCEPTS}


def test_training_never_asks_what_the_knowledge_items_ask() -> None:
    for fact in FACTS.values():
        for answer, names in (("yes", fact.true_of), ("no", fact.false_of)):
            asked, kept = fact.names(answer, taught=True), fact.names(answer, taught=False)
            assert not set(asked) & set(kept)
            assert {*asked, *kept} == names
            assert abs(len(asked) - len(kept)) <= 1


def test_training_draws_every_fact_and_answer_alike_often() -> None:
    rng = random.Random(0)
    drawn = [draw_knowledge(sample_scene(rng, NAMES, STYLES), rng) for _ in range(4000)]
    counts = Counter((q.kind, q.answer) for questions in drawn for q in questions)
    assert set(counts) == {(kind, answer) for kind in FACTS for answer in ("yes", "no")}
    mean = counts.total() / len(counts)
    assert all(mean / 2 < count < 2 * mean for count in counts.values()), counts


def test_more_often_draws_both_answers_of_a_fact_alike() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng, NAMES, STYLES) for _ in range(4000)]
    counts = [
        Counter((q.kind, q.answer) for s in scenes for q in draw_knowledge(s, rng, often))
        for often in (1, 8)
    ]
    for kind in FACTS:
        yes, no = (counts[1][kind, answer] for answer in ("yes", "no"))
        assert 2 / 3 < yes / no < 3 / 2, counts
    # Things that fly are two names of those that training knows, which 1 asks of whenever it can.
    assert counts[1]["alive", "yes"] > 5 * counts[0]["alive", "yes"]
    assert counts[1]["flies", "yes"] < 1.2 * counts[0]["flies", "yes"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_source_is_said_in_a_line(tmp_path: Path, file: str) -> None:
    for path in models.SOURCE_FOLDER.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes((models.SOURCE_FOLDER / file).read_bytes()[:500])
    with pytest.raises(FetchError, match="if its files are damaged, fetch them again"):
        models.load_source(tmp_path)
