"""The BabyAI policy: what it sees and reads, what is asked about it, and that it acts unread."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babyai_episodes import step
from PIL import Image

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.cache import PositionKind, SourceCache, join_sources
from mm_c2c.errors import ConfigError, InputError
from mm_c2c.reference.babyai import questions
from mm_c2c.reference.babyai.demonstrations import Demonstrations
from mm_c2c.reference.babyai.levels import ACTIONS, EASY, LEVELS, SEEDS, instruction_text, seeds
from mm_c2c.reference.babyai.make_items import (
    main,
    moments,
    swap,
)
from mm_c2c.reference.babyai.questions import answers
from mm_c2c.reference.babyai.rollouts import (
    POLICY,
    Step,
    load_episodes,
    load_policy,
    roll_out,
    save_episodes,
    success_rates,
)
from mm_c2c.reference.babyai.train_policy import (
    PolicyTrainingConfig,
    Pool,
    hidden_states,
    patch_words,
    train,
    word_table,
)
from mm_c2c.reference.babyai.warm_up_reader import (
    Phrases,
    SlotStates,
    fit_heads,
    phrases,
    slot_loss,
    slot_states,
)
from mm_c2c.rope import derotate
from mm_c2c.sources.action import TokenActionSource
from mm_c2c.sources.base import SourceInput
from mm_c2c.training.loop import Loop


@pytest.fixture(scope="module")
def policy() -> TokenActionSource:
    return load_policy(POLICY)


# --- levels -----------------------------------------------------------------------------------


def test_seeds_of_different_use_never_meet() -> None:
    spans = list(SEEDS.values())
    assert all(a.stop <= b.start for a, b in itertools.pairwise(spans))
    assert seeds("unseen", 5, 3) == range(2_000_005, 2_000_008)
    with pytest.raises(ConfigError, match="one of train, development, unseen, got 'test'"):
        seeds("test", 0, 1)
    with pytest.raises(ConfigError, match="no seeds 999999 to 1000001"):
        seeds("unseen", 999_999, 2)


def test_the_policy_reads_its_mission_and_its_last_actions() -> None:
    assert instruction_text("go to the red ball", []) == "go to the red ball. past: none"
    text = instruction_text("pick up a key", [2] * 30 + [0, 3])
    assert text == f"pick up a key. past: {'forward ' * 22}left pickup"


def test_the_camera_draws_what_minigrid_renders() -> None:
    pytest.importorskip("minigrid", reason="BabyAI levels need minigrid: the extra `robot`")
    from minigrid.wrappers import RGBImgPartialObsWrapper

    from mm_c2c.reference.babyai.levels import Camera, make_env, reset

    camera = Camera()
    env = make_env(LEVELS["PutNextLocal"].env)
    plain = RGBImgPartialObsWrapper(env, tile_size=8)
    rng = np.random.default_rng(0)
    for seed in range(3):
        observation = reset(env, seed)
        for _ in range(12):
            expected = plain.observation(observation)["image"]
            np.testing.assert_array_equal(
                np.asarray(camera.picture(observation["image"])), expected
            )
            observation, *_ = env.step(int(rng.choice([0, 1, 2, 2, 3])))
    with pytest.raises(InputError, match=r"views of \(batch, 7, 7, 3\), got \(1, 5, 5, 3\)"):
        camera.pixels(np.zeros((1, 5, 5, 3), dtype=np.uint8))


# --- demonstrations ---------------------------------------------------------------------------


def test_chunks_end_with_done_and_stop_at_a_random_move(tmp_path: Path) -> None:
    """Two episodes of 3 and 2 steps; in the second step another move than the bot's was made."""
    made = Demonstrations(
        views=np.zeros((5, 7, 7, 3), dtype=np.uint8),
        advised=np.array([0, 1, 2, 3, 4], dtype=np.uint8),
        executed=np.array([0, 2, 2, 3, 4], dtype=np.uint8),
        starts=np.array([0, 3, 5]),
        missions=["a", "b"],
        other_starts=np.array([0, 1, 1, 1, 1, 1]),
        other_missions=["c"],
        other_advised=np.array([2], dtype=np.uint8),
    )
    made.save(tmp_path / "x.npz")
    found = Demonstrations.load(tmp_path / "x.npz")
    assert (found.missions, found.other_missions) == (["a", "b"], ["c"])
    expected = [[0, 1, -1, -1], [1, -1, -1, -1], [2, 6, 6, 6], [3, 4, 6, 6], [4, 6, 6, 6]]
    assert found.chunks().tolist() == expected


def test_the_bot_is_asked_about_several_instructions() -> None:
    pytest.importorskip("minigrid", reason="BabyAI levels need minigrid: the extra `robot`")
    from mm_c2c.reference.babyai.demonstrations import collect

    found = collect((EASY[1], LEVELS["PickupLoc"].env), 60, 0)
    assert len(found.views) == len(found.advised) == found.starts[-1] >= 60
    assert len(found.starts) == len(found.missions) + 1
    assert found.other_starts[-1] == len(found.other_missions) == len(found.other_advised) > 60
    assert all(mission.startswith(("go to ", "pick up ")) for mission in found.other_missions)
    again = collect((EASY[1], LEVELS["PickupLoc"].env), 60, 0)
    np.testing.assert_array_equal(again.executed, found.executed)
    assert again.other_missions == found.other_missions


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """A folder of a few demonstrated steps."""
    pytest.importorskip("minigrid", reason="BabyAI levels need minigrid: the extra `robot`")
    from mm_c2c.reference.babyai.demonstrations import collect

    for name, env_id in (("easy", EASY[0]), ("full", LEVELS["PutNextLocal"].env)):
        collect((env_id,), 80, 0).save(tmp_path / f"{name}.npz")
    return tmp_path


@torch.no_grad()
def test_packed_instructions_are_read_as_each_alone(
    policy: TokenActionSource, demonstrations: Path
) -> None:
    """What training computes against the policy's own greedy `act`, which teacher forcing is."""
    from mm_c2c.reference.babyai.levels import Camera

    pool = Pool(demonstrations / "full.npz", policy.processor.tokenizer)
    batch = pool.draw(random.Random(0), 6)
    pixels = torch.from_numpy(Camera().pixels(batch.views))
    _, states = hidden_states(policy.model, pixels, batch.packed, 1)
    found = policy.model.lm_head(states).argmax(-1)
    words = policy.processor.tokenizer
    compared = 0
    for row, view in enumerate(pixels):
        for segment in range(int(batch.packed.segments[row].max()) + 1):
            inside = (batch.packed.segments[row] == segment).nonzero().flatten()
            first = inside[(batch.packed.labels[row, inside] != -100).nonzero()[0, 0]]
            prompt = batch.packed.input_ids[row, inside[0] + 1 : first]
            look = SourceInput(
                text=words.decode(prompt).strip(), images=(Image.fromarray(view.numpy()),)
            )
            assert policy.act([look]).tokens[0, 0] == found[row, first]
            compared += 1
    assert compared >= 12
    step = int(pool.data.starts[1]) - 1  # the last of the first episode
    (prompt, actions), *_ = pool._turns(step)
    past = pool.data.executed[:step].tolist()
    assert words.decode(prompt[1:-1]).strip() == instruction_text(pool.data.missions[0], past)
    assert actions == [len(words) - 1 - int(pool.data.advised[step]), 360, 360, 360]


def test_cells_are_to_say_their_colour_and_kind(policy: TokenActionSource) -> None:
    pytest.importorskip("minigrid", reason="numbers of objects come from minigrid")
    words = policy.processor.tokenizer
    views = np.zeros((1, 7, 7, 3), dtype=np.uint8)
    views[0, 2, 5] = (6, 4, 0)  # column 2, row 5: a yellow ball
    views[0, 3, 0] = (2, 5, 0)  # a grey wall is no object
    wanted = patch_words(views, word_table(words), words.pad_token_id)
    assert words.decode(wanted[0, 5 * 7 + 2]).split() == ["yellow", "ball"]
    assert int((wanted != words.pad_token_id).sum()) == 2


def test_the_policy_trains_and_goes_on_where_it_was_stopped(
    demonstrations: Path, tmp_path: Path
) -> None:
    shape = {"hidden_size": 32, "num_layers": 1, "tower_size": 32, "tower_layers": 1}
    config = PolicyTrainingConfig(
        data=demonstrations,
        out=tmp_path / "run",
        **shape,
        steps=4,
        warmup=1,
        easy_steps=1,
        batch_size=4,
        save_every=2,
        log_every=1,
    )
    train(config)
    whole = load_policy(tmp_path / "run" / "policy").model.state_dict()
    stopped = dataclasses.replace(config, out=tmp_path / "stopped", save_every=3)
    saved = Loop.run

    def stop(self: Loop, *args: Any, **kwargs: Any) -> None:
        saved(dataclasses.replace(self, steps=3), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "run", stop)
        train(stopped)
    train(stopped)
    again = load_policy(tmp_path / "stopped" / "policy").model.state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight)
    with pytest.raises(InputError, match=r"no demonstrations in .*easy\.npz; run python"):
        train(dataclasses.replace(config, data=tmp_path / "none", out=tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"steps \(1\) must exceed warmup \(1\)"):
        dataclasses.replace(config, steps=1)


# --- the policy -------------------------------------------------------------------------------


@pytest.fixture
def looks() -> list[SourceInput]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(2)]
    texts = ("go to the red ball. past: none", "pick up a key. past: left left forward")
    return [
        SourceInput(text=text, images=(Image.fromarray(picture),))
        for text, picture in zip(texts, pictures, strict=True)
    ]


def test_the_policy_acts_the_same_whether_it_is_read_or_not(
    policy: TokenActionSource, looks: list[SourceInput]
) -> None:
    before = policy.act(looks)
    cache = policy.prefill(looks)
    assert cache.kinds.shape[1] == cache.seq_len
    after = policy.act(looks)
    torch.testing.assert_close(after.tokens, before.tokens, rtol=0, atol=0)
    assert set(before.actions.round().flatten().tolist()) <= set(range(len(ACTIONS)))
    assert policy.bins.decode(torch.arange(360, 367)[:, None])[:, 0].round().tolist() == [
        6,
        5,
        4,
        3,
        2,
        1,
        0,
    ]


def test_the_policy_is_small_and_its_words_are_whole(policy: TokenActionSource) -> None:
    assert sum(p.numel() for p in policy.model.parameters()) < 1_100_000
    text = "put the yellow box next to the grey key. past: forward left pickup drop none"
    tokens = policy.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(text.split()) + 2  # the full stop and the colon
    assert policy.shape.num_key_value_heads * policy.shape.head_dim == 96


def test_rollouts_can_be_saved_and_the_policy_does_what_it_is_told(
    policy: TokenActionSource, tmp_path: Path
) -> None:
    pytest.importorskip("minigrid", reason="BabyAI levels need minigrid: the extra `robot`")
    found = list(roll_out(policy, "GoToLocal", seeds("development", 0, 12)))
    assert sorted(e.seed for e in found) == list(seeds("development", 0, 12))
    rates = success_rates(found)["GoToLocal"]
    assert rates["success"] >= 0.5  # at random it is below 0.2
    for done in found:
        assert all(s.action == s.chunk[0] and len(s.chunk) == 4 for s in done.steps)
        for number, one in enumerate(done.steps):
            past = [s.action for s in done.steps[:number]]
            assert one.text == instruction_text(done.mission, past)
    save_episodes(found, tmp_path / "rollouts.jsonl")
    assert load_episodes(tmp_path / "rollouts.jsonl") == found


def test_items_are_made_of_rollouts(
    policy: TokenActionSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("minigrid", reason="BabyAI levels need minigrid: the extra `robot`")
    from mm_c2c.reference.babyai.levels import Camera
    from mm_c2c.training.config import DataConfig
    from mm_c2c.training.data import open_examples

    found = list(roll_out(policy, "PickupLoc", seeds("development", 0, 10)))
    save_episodes(found, tmp_path / "rollouts.jsonl")
    for split in ("train", "unseen"):
        out = tmp_path / split
        arguments = ["x", split, "--rollouts", str(tmp_path / "rollouts.jsonl"), "--out", str(out)]
        monkeypatch.setattr("sys.argv", arguments)
        main()
    lines = (tmp_path / "unseen" / "items.jsonl").read_text().splitlines()
    item = json.loads(lines[0])
    done = next(e for e in found if e.name == item["episode"])
    there = done.steps[item["step"]]
    assert item["text"] == there.text
    assert item["instruction"] == done.mission
    assert item["success"] == done.success
    decoded = policy.bins.decode(torch.tensor(item["action_tokens"])).round()
    assert decoded.tolist() == list(there.chunk)
    with Image.open(tmp_path / "unseen" / item["image"]) as picture:
        expected = np.asarray(Camera().picture(there.symbols()))
        np.testing.assert_array_equal(np.asarray(picture), expected)

    examples = open_examples(DataConfig(path=str(tmp_path / "train" / "items.jsonl")), seed=0)
    assert len(examples.at(0).turns) > 1
    assert examples.at(0).look().action_tokens.shape == (4,)

    rng = random.Random(0)
    lies = swap(moments(found, policy, rng, 12), policy, Camera(), rng)
    assert lies
    for lie in lies:
        said = answers(lie.episode, lie.number)
        assert lie.told is not None
        assert lie.told["object"] in lie.mission
        assert lie.told["object"] != said["object"]
        assert lie.text.startswith(lie.mission + ". past: ")
        picture = Camera().picture(lie.episode.steps[lie.number].symbols())
        (chunk,) = policy.act([SourceInput(text=lie.text, images=(picture,))]).actions
        assert lie.told["next"] == questions.MOTIONS[ACTIONS[int(chunk[0].round())]]
        assert lie.told["next"] != said.get("next")

    several = swap(moments(found, policy, rng, 12), policy, Camera(), rng, most=6)
    assert len(several) > len({lie.name for lie in several})
    assert len(several) == len({(lie.name, lie.mission) for lie in several})


# --- a reader whose slots begin as words ------------------------------------------------------


@pytest.fixture
def reader(policy: TokenActionSource, tiny_target: Any, tiny_target_tokenizer: Any) -> Bridge:
    """A tiny one, with slots for cells, words and actions."""
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    fuser = FuserConfig(source=policy.shape, target=target.shape, hidden_size=24, rank=12)
    shapes: list[dict[str, Any]] = [
        {"rows": 7, "cols": 7},
        {"rows": 1, "cols": 6, "kinds": ("text",)},
        {"rows": 1, "cols": 4, "kinds": ("action",)},
    ]
    links = [LinkConfig(source="p", geometry="slots", fuser=fuser, **shape) for shape in shapes]
    return Bridge(target, {"p": policy}, BridgeConfig(links=tuple(links), slot_token="a"))


@pytest.fixture
def moment() -> Step:
    pytest.importorskip("minigrid", reason="numbers of objects come from minigrid")
    view = np.ones((7, 7, 3), dtype=np.uint8) * np.array([1, 0, 0], dtype=np.uint8)
    view[4, 3] = (6, 2, 0)  # column 4, row 3: a blue ball
    view[3, 6] = (7, 4, 0)  # held: a yellow box
    text = "go to the blue ball. past: left"
    hexed = view.tobytes().hex()
    return step(
        "forward", 0, 0, 0, view=hexed, text=text, chunk=(2, 0, 6, 6), carrying="yellow box"
    )


def read_moment(policy: TokenActionSource, moment: Step) -> SourceCache:
    from mm_c2c.reference.babyai.levels import Camera

    look = SourceInput(
        text=moment.text,
        images=(Camera().picture(moment.symbols()),),
        action_tokens=366 - torch.tensor(moment.chunk),
    )
    return policy.prefill([look])


def test_every_position_has_words_for_what_it_stands_for(
    policy: TokenActionSource, moment: Step
) -> None:
    cache = read_moment(policy, moment)
    (found,) = phrases(cache, [moment])
    kinds = cache.kinds[0].tolist()
    assert [kind == PositionKind.TEMPLATE for kind in kinds] == [words is None for words in found]
    cells = [words for words, kind in zip(found, kinds, strict=True) if kind == PositionKind.IMAGE]
    assert cells[3 * 7 + 4] == "On the right: blue ball"
    assert cells[6 * 7 + 3] == "In its hands: yellow box"
    assert Counter(cells) == {
        "On the left: nothing": 21,
        "On the right: nothing": 20,
        "Straight ahead: nothing": 6,
        "On the right: blue ball": 1,
        "In its hands: yellow box": 1,
    }
    told = [words for words, kind in zip(found, kinds, strict=True) if kind == PositionKind.TEXT]
    assert told[:5] == [
        f"The robot was told: {words}"
        for words in ("go", "go to", "to the", "the blue", "blue ball")
    ]
    assert found[-4:] == [
        "Next move: go forward",
        "Second move: turn left",
        "Third move: stop",
        "Fourth move: stop",
    ]


def test_what_is_to_lie_beside_and_what_was_done_have_words_of_their_own(
    policy: TokenActionSource, moment: Step
) -> None:
    text = "put a red box next to the blue ball. past: forward left"
    moment = dataclasses.replace(moment, text=text)
    cache = read_moment(policy, moment)
    words = [w for w, k in zip(*phrases(cache, [moment]), cache.kinds[0]) if k == PositionKind.TEXT]  # noqa: B905
    assert words[3] == "The robot was told: red box"
    assert words[8] == "The robot was told: next to blue ball"
    assert words[-1] == "The robot's past moves: forward left"


@torch.no_grad()
def test_words_are_the_targets_own_last_states(reader: Bridge) -> None:
    """Padded beside another phrase, against each alone."""
    texts = ["the cat", "a red square left of the dog"]
    (states,) = Phrases(reader).states([[texts[0], None, texts[1]]])
    assert states[1].abs().max() == 0
    for place, text in ((0, texts[0]), (2, texts[1])):
        ids = reader.target.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        cache = reader.target.model(ids, use_cache=True).past_key_values
        for layer, spec in enumerate(reader.target.rope(ids.shape[1])):
            keys, values = cache.layers[layer].keys, cache.layers[layer].values
            plain = derotate(keys, torch.arange(ids.shape[1])[None], spec)
            torch.testing.assert_close(states[place, layer, 0], plain[0, :, -1].flatten())
            torch.testing.assert_close(states[place, layer, 1], values[0, :, -1].flatten())


@torch.no_grad()
def test_slots_are_fitted_to_the_words(
    reader: Bridge, policy: TokenActionSource, moment: Step
) -> None:
    """Of two moments, all but told by their features, within the rank of the heads."""
    other = dataclasses.replace(moment, text="pick up a key. past: none", chunk=(0, 1, 3, 6))
    cache = join_sources([read_moment(policy, m) for m in (moment, other)])
    words = Phrases(reader)

    def read() -> dict[str, SlotStates]:
        return slot_states(reader, words, cache, [moment, other])

    before = {link: slot_loss(states) for link, states in read().items()}
    fit_heads(reader, reader.config.links, (read() for _ in range(2)), ridge=1e-3)
    for link, states in read().items():
        assert slot_loss(states) < 0.5 * min(before[link], 1.0), link
