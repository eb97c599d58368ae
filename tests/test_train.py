"""`mm-c2c train` on tiny models that are loaded from disk, as any others are."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load
from tiny_vlm import TinyVLM

from mm_c2c import Bridge, FuserConfig, LinkConfig
from mm_c2c.cache import CacheShape
from mm_c2c.cli import main
from mm_c2c.config import load_config, override
from mm_c2c.errors import ConfigError, InputError, TrainingError, UnsupportedError
from mm_c2c.sources.base import SourceInput
from mm_c2c.training import loop
from mm_c2c.training.config import DropConfig, TrainingConfig
from mm_c2c.training.data import open_examples
from mm_c2c.training.kept import KeptCaches, row_key
from mm_c2c.training.log import read_log
from mm_c2c.training.loop import build_accelerator
from mm_c2c.training.models import load_source, load_target
from mm_c2c.training.objective import Asked, Objective
from mm_c2c.training.run import Trainer, run_training

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
WORDS = ["what is left", "what is in the image", "is it a circle or a square", "where is the cat"]


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def settings(
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tiny_llava: TinyVLM,
    pictures: list[Image.Image],
    tmp_path: Path,
) -> list[str]:
    """What `configs/tiny.yaml` names, made: both models and three examples with several questions."""
    for name, model, reader in (
        ("target", tiny_target, tiny_target_tokenizer),
        ("source", *reversed(tiny_llava)),
    ):
        model.save_pretrained(tmp_path / name)
        reader.save_pretrained(tmp_path / name)
    lines = []
    for index, count in enumerate((1, 3, 2)):
        picture = pictures[index % 2].rotate(90 * index)
        picture.save(tmp_path / f"{index}.png")
        for question in WORDS[:count]:
            row = {
                "image": f"{index}.png",
                "question": question,
                "answer": ["red", "a blue circle", "cat"][index],
                "caption": f"picture {index} shows a square and a cat",
            }
            lines.append(json.dumps(row) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    return [
        f"sources.eyes.model={tmp_path / 'source'}",
        f"target.model={tmp_path / 'target'}",
        f"data.path={tmp_path / 'data.jsonl'}",
        f"out={tmp_path / 'out'}",
    ]


@pytest.fixture
def config(settings: list[str]) -> TrainingConfig:
    return load_config(TrainingConfig, TINY, settings)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load((out / "bridge" / "model.safetensors").read_bytes())


def go(config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Train in this process; returns the fuser's weights."""
    accelerator = build_accelerator(config.out, precision=config.precision, cpu=True)
    sources = {name: load_source(model) for name, model in config.sources.items()}
    run_training(config, accelerator, load_target(config.target), sources)
    return weights(config.out)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].equal(weight), name


def test_tiny_yaml_trains_two_steps_and_resumes(
    settings: list[str], config: TrainingConfig, tmp_path: Path
) -> None:
    assert main(["train", str(TINY), *settings]) == 0
    before = weights(config.out)
    assert main(["train", str(TINY), *settings, "phases.generate.steps=4"]) == 0
    after = weights(config.out)
    log = read_log(config.out / "log.csv")
    assert log["step"] == [1, 2, 3, 4, 5, 6]
    assert all(speed > 0 for speed in log["tokens_per_s"])
    assert log["open_gates"] == [1.0] * 6
    assert any(not before[name].equal(after[name]) for name in before)
    bridge = Bridge.from_pretrained(
        config.out / "bridge",
        load_target(config.target),
        {"eyes": load_source(config.sources["eyes"])},
    )
    frozen = load_target(config.target).model.state_dict()
    assert all(w.equal(frozen[n]) for n, w in bridge.target.model.state_dict().items())


def launch_two(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr[-9000:]
    assert "on 2 processes" in done.stderr


def test_two_processes_give_the_weights_of_one(
    settings: list[str], config: TrainingConfig, tmp_path: Path
) -> None:
    settings = [*settings, "batch_size=4", "optimizer.name=adamw"]
    expected = go(override(config, ["batch_size=4", "optimizer.name=adamw"]))
    two = [*settings, f"out={tmp_path / 'two'}"]
    # accelerate's own launcher starts several CPU processes through MPI only.
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mm_c2c.cli"]
    launch_two([*launch, "train", str(TINY), *two], {"ACCELERATE_USE_CPU": "true"})
    torch.testing.assert_close(weights(tmp_path / "two"), expected, atol=1e-5, rtol=0)
    logged, single = (read_log(folder / "log.csv") for folder in (tmp_path / "two", config.out))
    assert logged["loss"] == pytest.approx(single["loss"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_weights_sharded_over_two_processes_are_those_of_one_also_resumed(
    settings: list[str], config: TrainingConfig, tmp_path: Path, strategy: str
) -> None:
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install deepspeed")
    expected = go(override(config, ["batch_size=4", "optimizer.name=adamw"]))
    settings = [*settings, "batch_size=4", "optimizer.name=adamw", f"out={tmp_path / 'two'}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["accelerate.commands.launch", f"--main_process_port={port}", "--num_processes=2"]
    launch += [f"--config_file={ROOT / 'configs' / 'accelerate' / strategy}.yaml"]
    for stop in (["phases.generate.steps=0"], []):
        command = [*launch, str(ROOT / "tests/sharded.py"), "train", str(TINY), *settings, *stop]
        launch_two(command, {"DS_ACCELERATOR": "cpu"})
    torch.testing.assert_close(weights(tmp_path / "two"), expected, atol=1e-5, rtol=0)
    logged = read_log(tmp_path / "two" / "log.csv")
    assert logged["step"] == [1, 2, 3, 4]
    # Of weights in parts no process could tell.
    assert ("open_gates" in logged) == (strategy == "deepspeed")


def test_pieces_of_a_step_give_the_weights_of_the_whole(
    config: TrainingConfig, tmp_path: Path
) -> None:
    config = override(config, ["batch_size=4", "optimizer.name=adamw"])
    whole = go(config)
    pieces = go(override(config, ["accumulation=4", f"out={tmp_path / 'pieces'}"]))
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)


@contextmanager
def stopped_at(number: int) -> Iterator[None]:
    """The user stops what comes to this piece."""
    loss = Trainer.loss

    def stop(self: Trainer, current: int, rng: Any) -> torch.Tensor:
        if current == number:
            raise KeyboardInterrupt
        return loss(self, current, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "loss", stop)
        yield


def test_a_stopped_training_ends_as_one_that_was_not(
    config: TrainingConfig, tmp_path: Path
) -> None:
    expected = go(replace(config, out=tmp_path / "whole"))
    with stopped_at(3), pytest.raises(KeyboardInterrupt):
        go(config)
    assert_same(go(config), expected)


def test_a_training_goes_on_from_sharded_checkpoints(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What FSDP and DeepSpeed take, on one process: accelerate's own files in place of `last.pt`.
    monkeypatch.setattr(loop, "_SHARDED", (build_accelerator(tmp_path, cpu=True).distributed_type,))
    config = override(config, ["optimizer.name=adamw"])
    expected = go(replace(config, out=tmp_path / "whole"))
    with stopped_at(3), pytest.raises(KeyboardInterrupt):
        go(config)
    assert [path.name for path in config.out.glob("step*")] == ["step-00000003"]
    assert_same(go(config), expected)


def test_a_process_killed_amid_a_checkpoint_leaves_the_last_one_whole(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = go(replace(config, out=tmp_path / "whole"))
    save = torch.save

    def die(state: Any, path: Path) -> None:
        save(state, path)
        if state["step"] == 3:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork beside a thread of the progress bar
        child = os.fork()
    if not child:
        monkeypatch.setattr(torch, "save", die)
        go(config)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (config.out / "last.part").exists()
    assert torch.load(config.out / "last.pt", weights_only=True)["step"] == 2
    assert_same(go(config), expected)


def test_a_full_disk_stops_with_the_last_checkpoint_whole(config: TrainingConfig) -> None:
    go(override(config, ["phases.generate.steps=0"]))
    size = (config.out / "last.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(TrainingError, match=r"step 3: .* of step 2, is whole: make room"):
            go(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(config.out / "last.pt", weights_only=True)["step"] == 2
    assert not (config.out / "last.part").exists()


def test_steps_that_are_not_finite_stop_or_are_left_out(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loss = Trainer.loss

    def poison(self: Trainer, number: int, rng: Any) -> torch.Tensor:
        return loss(self, number, rng) * (math.nan if number == 2 else 1.0)

    monkeypatch.setattr(Trainer, "loss", poison)
    with pytest.raises(TrainingError, match=r"step 3: .* last good checkpoint is of step 2"):
        go(config)
    found = go(override(config, ["on_nan=skip", f"out={tmp_path / 'skip'}"]))
    assert all(weight.isfinite().all() for weight in found.values())
    lost = read_log(tmp_path / "skip" / "log.csv")["loss"]
    assert [math.isnan(value) for value in lost] == [False, False, True, False]


def test_bfloat16_products_leave_float32_weights(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, cast = Trainer.loss, []

    def look(self: Trainer, number: int, rng: Any) -> torch.Tensor:
        cast.append(torch.is_autocast_enabled("cpu"))
        return loss(self, number, rng)

    monkeypatch.setattr(Trainer, "loss", look)
    found = go(override(config, ["precision=bf16", "optimizer.name=adamw"]))
    assert cast == [True] * 4
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    gates = found["eyes_slots.gate_logits"]
    assert not gates.equal(gates.bfloat16().float())  # finer than bfloat16 could tell


def test_what_cannot_be_is_refused(config: TrainingConfig, settings: list[str]) -> None:
    for setting, message in (
        ("precision=fp16", "precision must be one of fp32, bf16"),
        ("links.eyes.row=3", r"unknown key 'links.eyes.row'; did you mean 'rows'"),
        ("links.eyes.source=ears", "names source 'ears'; sources: eyes"),
        ("phases.generate.warmup=5", r"steps \(2\) must exceed warmup \(5\)"),
        ("drop.sources=1.5", r"drop.sources must be in \[0, 1\]"),
        ("tracking=[aim]", "tracking must be one of tensorboard, wandb"),
    ):
        with pytest.raises(ConfigError, match=message):
            override(config, [setting])
    with pytest.raises(ConfigError, match="cannot be cut into 1 processes x 3 pieces"):
        go(override(config, ["accumulation=3"]))
    with pytest.raises(UnsupportedError, match="pip install wandb"):
        build_accelerator(config.out, tracking=["wandb"], cpu=True)


# --- what is left out at random -----------------------------------------------------------


def test_dropped_links_leave_all_their_slots(config: TrainingConfig) -> None:
    """In all rows, so that nothing is learned; in some, whole links."""
    still = ["optimizer.name=adamw", "optimizer.weight_decay=0", "phases.reconstruct.steps=0"]
    config = override(config, [*still, "drop.sources=0", "drop.links=1"])
    before = go(config)
    assert_same(go(override(config, ["phases.generate.steps=3"])), before)
    drop = DropConfig(sources=0, slots=0.2, links=0.5, named={"eyes_aligned": 0.0})
    objective = Objective(None, None, drop)  # type: ignore[arg-type]
    rng = random.Random(0)
    shape = CacheShape(num_layers=1, num_key_value_heads=1, head_dim=2)
    fuser = FuserConfig(source=shape, target=shape)
    link = LinkConfig(source="eyes", geometry="slots", rows=5, cols=10, fuser=fuser)
    rows = [objective._kept_slots(link, rng) for _ in range(200)]
    dropped = [row for row in rows if not any(row)]
    assert 70 < len(dropped) < 130
    assert 0.75 < sum(map(sum, rows)) / (50 * (200 - len(dropped))) < 0.85
    spared = replace(objective, drop=DropConfig(links=1.0, named={link.name: 0.0}))
    assert all(spared._kept_slots(link, rng))


def test_a_link_is_dropped_by_its_name(config: TrainingConfig) -> None:
    still = ["optimizer.name=adamw", "optimizer.weight_decay=0", "phases.reconstruct.steps=0"]
    config = override(config, [*still, "drop.sources=0"])
    before = go(override(config, ["drop.links=1"]))
    named = ["drop.named.eyes_slots=1.0", "phases.generate.steps=3"]
    assert_same(go(override(config, named)), before)
    with pytest.raises(ConfigError, match=r"a link of drop.named must be one of .*eyes_slots"):
        go(override(config, ["drop.named.eyes=1.0"]))
    with pytest.raises(ConfigError, match=r"drop.named.eyes must be in \[0, 1\], got 2"):
        override(config, ["drop.named.eyes=2.0"])


def test_frozen_weights_stay_while_others_move(config: TrainingConfig, tmp_path: Path) -> None:
    first = go(override(config, ["phases.generate.steps=3"]))
    again = ["frozen=[eyes_slots.projection.head_]", "phases.generate.steps=6"]
    start = [f"start={config.out / 'bridge'}", f"out={tmp_path / 'more'}"]
    after = go(override(config, [*again, *start]))
    moved = {name for name, weight in after.items() if not torch.equal(weight, first[name])}
    heads = {name for name in after if name.startswith("eyes_slots.projection.head_")}
    assert heads
    assert not moved & heads
    assert len(moved) > len(heads) / 2
    with pytest.raises(ConfigError, match="no weight's name begins with 'ears'; links: eyes_slots"):
        go(override(config, ["frozen=[ears]"]))


def test_dropped_slots_and_sources_leave_their_mark(config: TrainingConfig) -> None:
    still = ["optimizer.name=adamw", "optimizer.weight_decay=0", "phases.reconstruct.steps=0"]
    config = override(config, [*still, "drop.sources=0", "drop.slots=1"])
    before = go(config)
    assert_same(go(override(config, ["phases.generate.steps=3"])), before)
    # With the slots in place, the same steps move weights.
    after = go(override(config, ["phases.generate.steps=4", "drop.slots=0"]))
    assert any(not before[name].equal(after[name]) for name in before)


def test_packed_questions_cost_what_they_cost_one_by_one(config: TrainingConfig) -> None:
    """The loss and its gradients, also where an example has fewer questions than another."""
    quiet = ["drop.sources=0.5", "drop.links=0.3", "data.questions=3", "batch_size=3"]
    config = override(config, [*quiet, "phases.reconstruct.steps=0"])
    sources = {name: load_source(model) for name, model in config.sources.items()}
    found = []
    for packed in (False, True):
        accelerator = build_accelerator(config.out, cpu=True)
        examples = open_examples(config.data, config.seed)
        trainer = Trainer(
            replace(config, packed=packed),
            accelerator,
            load_target(config.target),
            sources,
            examples,
        )
        torch.manual_seed(0)
        for weight in trainer.bridge.fusers.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        loss = trainer.loss(0, random.Random(0))
        loss.backward()
        found.append([loss, *(w.grad for w in trainer.bridge.fusers.parameters())])
        assert trainer.gauges(1.0)["tokens_per_s"] > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", ["drop.questions=0.5", "links.eyes.geometry=aligned"])
def test_packing_wants_slots_that_are_question_blind(config: TrainingConfig, other: str) -> None:
    with pytest.raises(ConfigError, match="packed"):
        override(config, ["packed=true", other])


def test_sources_may_hear_the_question(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    prefill = Trainer.prefill

    def listen(self: Trainer, name: str, looks: list[SourceInput]) -> Any:
        heard.extend(look.text for look in looks)
        return prefill(self, name, looks)

    monkeypatch.setattr(Trainer, "prefill", listen)
    go(override(config, ["drop.questions=0"]))
    assert set(heard) <= set(WORDS)
    assert len(set(heard)) > 1
    heard.clear()
    go(override(config, ["out=" + str(config.out / "blind")]))
    assert set(heard) == {""}


@pytest.mark.parametrize("pooling", ["window", "resampler"])
def test_examples_of_unlike_numbers_of_pictures_are_learned_from_as_each_alone(
    config: TrainingConfig, tmp_path: Path, pooling: str
) -> None:
    """The loss and its gradients, with and without kept caches, and while parts are dropped."""
    path = Path(config.data.path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        first = int(row.pop("image").partition(".")[0])
        row["images"] = [f"{picture}.png" for picture in range(first, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {**config.links["eyes"], "images": 3, "pooling": pooling}
    config = replace(config, batch_size=3, links={"eyes": shape})
    sources = {name: load_source(model) for name, model in config.sources.items()}
    accelerator = build_accelerator(config.out, cpu=True)
    examples = open_examples(config.data, config.seed)
    assert {len(examples.at(place).images) for place in range(3)} == {1, 2, 3}

    def gradients(*settings: str) -> list[torch.Tensor]:
        """Of one step, in pieces of as many examples as there are."""
        chosen = override(config, list(settings))
        trainer = Trainer(chosen, accelerator, load_target(config.target), sources, examples)
        torch.manual_seed(0)
        for weight in trainer.bridge.fusers.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        total = sum(
            trainer.loss(piece, random.Random(0)) / chosen.accumulation
            for piece in range(chosen.accumulation)
        )
        assert isinstance(total, torch.Tensor)
        total.backward()
        return [total, *(weight.grad for weight in trainer.bridge.fusers.parameters())]

    whole = gradients("drop.sources=0", "drop.slots=0")
    assert all(part.isfinite().all() for part in whole)
    kept = f"kept.folder={tmp_path / 'kept'}"
    for settings in (["accumulation=3"], [kept], [kept], [kept, "accumulation=3"]):
        found = gradients("drop.sources=0", "drop.slots=0", *settings)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    dropped = gradients("drop.sources=0.5", "drop.slots=0.5")
    found = gradients("drop.sources=0.5", "drop.slots=0.5", "accumulation=3")
    torch.testing.assert_close(found, dropped, rtol=1e-4, atol=1e-5)
    assert not dropped[0].isclose(whole[0])
    assert all(weight.isfinite().all() for weight in go(config).values())


# --- kept caches --------------------------------------------------------------------------


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that sources have read, a call each."""
    from mm_c2c.sources.vlm import VLMSource

    calls: list[int] = []
    prefill = VLMSource.prefill

    def count(self: VLMSource, inputs: Any) -> Any:
        calls.append(len(inputs))
        return prefill(self, inputs)

    monkeypatch.setattr(VLMSource, "prefill", count)
    return calls


def test_later_epochs_do_not_run_the_source(
    config: TrainingConfig, prefills: list[int], tmp_path: Path
) -> None:
    plain = go(replace(config, out=tmp_path / "plain"))
    assert sum(prefills) == 8
    prefills.clear()
    kept = override(config, [f"kept.folder={tmp_path / 'kept'}"])
    found = go(kept)
    assert sum(prefills) == 3  # one for each example
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    prefills.clear()
    assert_same(go(replace(kept, out=tmp_path / "again")), found)
    assert not prefills


def test_kept_caches_stay_within_their_budget_and_survive_damage(
    config: TrainingConfig, pictures: list[Image.Image], tmp_path: Path, prefills: list[int]
) -> None:
    source = load_source(config.sources["eyes"])
    looks = [SourceInput(images=(picture,)) for picture in pictures[:2]]
    keys = [row_key("a", look) for look in looks]
    assert len({*keys, row_key("b", looks[0]), row_key("a", replace(looks[0], text="x"))}) == 4
    acted = {row_key("a", replace(looks[0], action_tokens=torch.tensor([i]))) for i in range(2)}
    assert len({*keys, *acted}) == 4

    def fetch(kept: KeptCaches, order: list[int]) -> Any:
        return kept.fetch(
            [keys[at] for at in order],
            lambda rows: source.prefill([looks[order[row]] for row in rows]),
        )

    whole = source.prefill(looks)
    folder = tmp_path / "kept"
    fetch(KeptCaches(folder, 10**9), [0, 1])
    prefills.clear()
    found = fetch(KeptCaches(folder, 10**9, process=1), [1, 0])
    assert not prefills  # another process's are read too
    for (keys_, values), (k, v) in zip(found.layers, whole.layers, strict=True):
        torch.testing.assert_close(keys_, k[[1, 0]])
        torch.testing.assert_close(values, v[[1, 0]])
    assert found.grids == whole.grids[::-1]
    assert found.patches.equal(whole.patches[[1, 0]])

    fetch(KeptCaches(tmp_path / "none", whole.num_bytes - 1), [0, 1])
    assert not list((tmp_path / "none").glob("*.safetensors"))

    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    prefills.clear()
    fetch(KeptCaches(folder, 10**9), [0, 1])
    assert prefills == [2]


# --- two texts, and what is learned -------------------------------------------------------


@pytest.fixture
def text_config(
    config: TrainingConfig, tiny_text_source: Any, tiny_text_source_tokenizer: Any, tmp_path: Path
) -> TrainingConfig:
    """A text source whose words are aligned with the target's."""
    tiny_text_source.save_pretrained(tmp_path / "reader")
    tiny_text_source_tokenizer.save_pretrained(tmp_path / "reader")
    rows = [
        {"question": question, "answer": "red", "caption": "a red square", "text": "see : red"}
        for question in WORDS
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"sources={{reader: {{model: {tmp_path / 'reader'}}}}}",
        "links={words: {source: reader, geometry: aligned, fuser: {hidden_size: 16, rank: 4}}}",
        f"data.path={tmp_path / 'texts.jsonl'}",
        "drop.slots=0",
    ]
    return override(config, settings)


def test_words_of_a_text_source_are_trained_on(text_config: TrainingConfig) -> None:
    first = go(override(text_config, ["phases.generate.steps=0"]))
    after = go(text_config)
    assert any(not first[name].equal(after[name]) for name in first)


def test_answers_may_be_the_sources_own(
    text_config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, answers = Objective.generate, []

    def look(self: Objective, fused: Any, asked: Asked) -> torch.Tensor:
        answers.extend(turn.answer for turn in asked.turns)
        return read(self, fused, asked)

    monkeypatch.setattr(Objective, "generate", look)
    go(override(text_config, ["phases.generate.distill=1"]))
    assert answers
    assert "red" not in answers


def test_both_phases_lower_their_loss(config: TrainingConfig, tmp_path: Path) -> None:
    steps = ["drop.sources=0", "drop.slots=0", "batch_size=3", "optimizer.learning_rate=0.02"]
    for phase, other in (("reconstruct", "generate"), ("generate", "reconstruct")):
        name = f"out={tmp_path / phase}"
        tuned = override(
            config, [*steps, name, f"phases.{phase}.steps=20", f"phases.{other}.steps=0"]
        )
        go(tuned)
        losses = read_log(tmp_path / phase / "log.csv")["loss"]
        assert losses[-1] < 0.997 * losses[0], phase


def test_a_true_description_is_asked_for(text_config: TrainingConfig, tmp_path: Path) -> None:
    path = Path(text_config.data.path)
    path.write_text(path.read_text().replace("caption", "legend"))
    with pytest.raises(InputError, match="wants a `caption` in each example"):
        go(text_config)
