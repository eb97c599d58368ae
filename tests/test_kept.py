"""Source caches on disk: whose they are, who may write them, and how much."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from policies import build_pi0
from safetensors.torch import load_file, save_file
from smolvla import build_smol, pair_mask
from tiny_vlm import TinyVLM
from training_rigs import TINY, assert_same, go

from mm_c2c import SourceCache, load_cache
from mm_c2c.cache import LayerKV, PositionKind
from mm_c2c.config import load_config, override
from mm_c2c.geometry import find
from mm_c2c.pretrained import SAMPLE
from mm_c2c.sources import SourceInput
from mm_c2c.sources.smolvla import SmolVLASource
from mm_c2c.sources.text import TextSource
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.training import kept
from mm_c2c.training.blank import BlankSource
from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.kept import KeptCaches, fingerprint_source, row_key

Fetch = Callable[[KeptCaches, list[int]], tuple[SourceCache, list[int]]]
PLENTY = 10**9


@pytest.fixture
def source(tiny_llava: TinyVLM) -> VLMSource:
    return VLMSource(tiny_llava.model, tiny_llava.processor, "tiny-llava")


@pytest.fixture
def looks(pictures: list[Image.Image]) -> list[SourceInput]:
    """Four, two of which are longer."""
    return [
        SourceInput(images=(picture,), text=text)
        for text in ("", "what is in the image ?")
        for picture in pictures
    ]


@pytest.fixture
def fetch(source: VLMSource, looks: list[SourceInput]) -> Fetch:
    """What comes of looks by their numbers, and those of them that were computed."""

    def run(kept: KeptCaches, order: list[int]) -> tuple[SourceCache, list[int]]:
        computed: list[int] = []

        def compute(rows: list[int]) -> SourceCache:
            computed.extend(order[row] for row in rows)
            return source.prefill([looks[order[row]] for row in rows])

        return kept.fetch([row_key("a", looks[at]) for at in order], compute), computed

    return run


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def file_of(folder: Path, look: SourceInput) -> Path:
    (path,) = folder.rglob(f"{row_key('a', look)}.safetensors")
    return path


def assert_close_caches(found: SourceCache, expected: SourceCache) -> None:
    torch.testing.assert_close(found.layers, expected.layers, atol=1e-5, rtol=1e-4)
    for name in ("kinds", "patches", "spans", "position_ids"):
        assert getattr(found, name).equal(getattr(expected, name)), name
    assert (found.grids, found.texts) == (expected.grids, expected.texts)


def without_padded_states(cache: SourceCache) -> SourceCache:
    """Nothing where a row is padded: what a model leaves there has no meaning."""
    real = (cache.kinds != PositionKind.PAD)[:, None, :, None]
    layers = tuple(LayerKV(kv.keys * real, kv.values * real) for kv in cache.layers)
    return replace(cache, layers=layers)


# --- rows ---------------------------------------------------------------------------------


def test_a_key_tells_looks_and_sources_apart(looks: list[SourceInput]) -> None:
    acted = [replace(looks[0], action_tokens=torch.tensor([i])) for i in range(2)]
    noisy = [replace(looks[0], noise=torch.full((2, 2), float(i))) for i in range(2)]
    keys = {row_key(salt, look) for salt in ("a", "b") for look in (*looks, *acted, *noisy)}
    assert len(keys) == 16


def test_rows_come_back_in_any_order_and_batch(
    fetch: Fetch, source: VLMSource, looks: list[SourceInput], tmp_path: Path
) -> None:
    fetch(KeptCaches(tmp_path, PLENTY), [0, 1, 2, 3])
    found, computed = fetch(KeptCaches(tmp_path, PLENTY), [3, 0, 1])
    assert not computed
    expected = source.prefill([looks[at] for at in (3, 0, 1)])
    assert_close_caches(found, without_padded_states(expected))


def test_rows_are_kept_without_padding(fetch: Fetch, tmp_path: Path) -> None:
    whole, _ = fetch(KeptCaches(tmp_path, PLENTY), [0, 3])
    rows = [load_cache(path) for path in files(tmp_path)]
    assert len({row.seq_len for row in rows}) == 2
    assert all(row.batch_size == 1 and row.kinds.all() for row in rows)
    assert max(row.seq_len for row in rows) == whole.seq_len


def test_two_may_write_into_one_folder_at_once(
    fetch: Fetch, source: VLMSource, looks: list[SourceInput], tmp_path: Path
) -> None:
    one, two = (KeptCaches(tmp_path, PLENTY) for _ in range(2))
    fetch(one, [0, 1])
    fetch(two, [2, 3])
    for order in ([0, 1], [3, 2]):
        found, computed = fetch(KeptCaches(tmp_path, PLENTY), order)
        assert not computed
        expected = source.prefill([looks[at] for at in order])
        assert_close_caches(found, without_padded_states(expected))
    assert fetch(one, [2])[1] == []  # the other's are read too


def test_a_row_that_is_gone_is_computed_again_and_no_other(
    fetch: Fetch, source: VLMSource, looks: list[SourceInput], tmp_path: Path
) -> None:
    kept = KeptCaches(tmp_path, PLENTY)
    fetch(kept, [0])
    fetch(kept, [1])
    file_of(tmp_path, looks[0]).unlink()
    for again in (kept, KeptCaches(tmp_path, PLENTY)):
        fetch(again, [2])
        found, computed = fetch(again, [1])
        assert not computed
        assert_close_caches(found, source.prefill([looks[1]]))
    assert fetch(kept, [0, 1])[1] == [0]
    assert fetch(kept, [0, 1])[1] == []


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_row_is_computed_again_and_replaced(
    damage: str,
    fetch: Fetch,
    looks: list[SourceInput],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, _ = fetch(KeptCaches(tmp_path, PLENTY), [0, 1])
    path = file_of(tmp_path, looks[1])
    content = path.read_bytes()
    changed = bytes([content[-1] ^ 1])
    path.write_bytes(content[:100] if damage == "cut off" else content[:-1] + changed)
    found, computed = fetch(KeptCaches(tmp_path, PLENTY), [0, 1])
    assert computed == [1]
    assert_close_caches(found, expected)
    (warning,) = caplog.messages
    assert str(path) in warning
    assert warning.endswith("it is computed again")
    assert fetch(KeptCaches(tmp_path, PLENTY), [0, 1])[1] == []


def test_what_is_there_counts_and_processes_share_the_rest(
    fetch: Fetch, looks: list[SourceInput], tmp_path: Path
) -> None:
    fetch(KeptCaches(tmp_path / "all", PLENTY), [0])
    size = file_of(tmp_path / "all", looks[0]).stat().st_size
    folder = tmp_path / "kept"

    def count(budget: float, order: list[int], processes: int = 1) -> int:
        fetch(KeptCaches(folder, int(budget * size), processes), order)
        return len(files(folder))

    assert count(0.5, [0, 1]) == 0
    assert count(1.5, [0, 1]) == 1
    assert count(1.5, [1]) == 1
    assert count(3.5, [0, 1], processes=4) == 1
    assert count(3.5, [0, 1], processes=2) == 2
    assert count(0.5, [3]) == 2


# --- sources ------------------------------------------------------------------------------


@pytest.fixture(params=["vlm", "text", "pi0", "smolvla", "blank"])
def build(
    request: pytest.FixtureRequest,
    tiny_text_source: Any,
    tiny_text_source_tokenizer: Any,
    source: VLMSource,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], Any]:
    """A source of each form, the same whenever it is made."""
    lerobot = SimpleNamespace(make_att_2d_masks=pair_mask)
    monkeypatch.setattr("mm_c2c.sources.smolvla._lerobot_smolvla", lambda: lerobot)
    builds: dict[str, Callable[[], Any]] = {
        "vlm": lambda: source,
        "text": lambda: TextSource(tiny_text_source, tiny_text_source_tokenizer, "tiny"),
        "pi0": build_pi0,
        "smolvla": lambda: SmolVLASource(*build_smol(), "tiny"),
        "blank": lambda: BlankSource(find("Qwen2.5-VL-3B"), [], "float32", true_width=False),
    }
    return builds[request.param]


def test_a_fingerprint_tells_a_sources_weights(build: Callable[[], Any]) -> None:
    source = build()
    found = [fingerprint_source(source)]
    assert fingerprint_source(build()) == found[0]
    next(source.model.parameters()).add_(1e-3)
    found.append(fingerprint_source(source))
    source.model.bfloat16()
    found.append(fingerprint_source(source))
    source.origin = source.origin._replace(revision="other")
    found.append(fingerprint_source(source))
    assert len(set(found)) == 4


def test_a_fingerprint_tells_settings(source: VLMSource, tiny_text_source_tokenizer: Any) -> None:
    found = [fingerprint_source(source)]
    source.model.config.vision_feature_layer -= 1
    found.append(fingerprint_source(source))
    source.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    found.append(fingerprint_source(source))
    source.processor.chat_template += " "
    found.append(fingerprint_source(source))
    text = TextSource(source.model, tiny_text_source_tokenizer, "tiny-llava")
    found.append(fingerprint_source(text))
    text.tokenizer.chat_template += " "
    found.append(fingerprint_source(text))
    assert len(set(found)) == 6


def test_a_fingerprint_tells_which_noise_a_policy_is_read_at() -> None:
    policy = build_pi0()
    first = fingerprint_source(policy)
    policy.seed += 1
    assert fingerprint_source(policy) != first


def test_every_column_of_a_large_tensor_may_tell_it_from_others(source: VLMSource) -> None:
    """One in a power of two, by which an even step would pass for ever."""
    large = torch.nn.Linear(64, 64 * SAMPLE, bias=False)
    source.model.extra = large.requires_grad_(requires_grad=False)
    found = {fingerprint_source(source)}
    for column in range(64):
        large.weight[:, column] += 1
        found.add(fingerprint_source(source))
    assert len(found) == 65


# --- trainings ----------------------------------------------------------------------------


@pytest.fixture
def config(tiny_settings: list[str], fresh_accelerate: None) -> TrainingConfig:
    return load_config(TrainingConfig, TINY, tiny_settings)


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that sources have read, a call each."""
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


def test_a_source_whose_weights_change_in_place_is_read_anew(
    config: TrainingConfig, prefills: list[int], tmp_path: Path
) -> None:
    kept = override(config, [f"kept.folder={tmp_path / 'kept'}"])
    before = go(kept)
    path = Path(config.sources["eyes"].model) / "model.safetensors"
    changed = {name: weight * 1.5 for name, weight in load_file(path).items()}
    save_file(changed, path, {"format": "pt"})
    prefills.clear()
    found = go(replace(kept, out=tmp_path / "again"))
    assert sum(prefills) == 3
    plain = go(replace(config, out=tmp_path / "plain"))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    assert any(not found[name].isclose(before[name], rtol=1e-3).all() for name in found)


@pytest.mark.parametrize("full", ["already", "soon"])
def test_a_full_disk_costs_what_is_kept_and_not_the_training(
    config: TrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    full: str,
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = override(config, [f"kept.folder={tmp_path / 'kept'}"])
    expected = go(replace(config, out=tmp_path / "whole", kept=None))
    if full == "already":
        monkeypatch.setattr(kept, "save_cache", fail)
    else:  # what is left is for checkpoints
        usage = SimpleNamespace(free=kept._RESERVE + 1000)
        monkeypatch.setattr(kept.shutil, "disk_usage", lambda folder: usage)
    assert_same(go(config), expected)
    words = {"already": "No space left on device", "soon": "less than 1 GB would be left"}
    assert caplog.text.count(words[full]) == 1
    assert not files(tmp_path / "kept")


def test_what_is_shown_twice_is_read_and_counted_once(
    fetch: Fetch, source: VLMSource, looks: list[SourceInput], tmp_path: Path
) -> None:
    caches = KeptCaches(tmp_path, PLENTY)
    found, computed = fetch(caches, [0, 3, 0, 0, 3])
    assert computed == [0, 3]
    expected = source.prefill([looks[at] for at in (0, 3, 0, 0, 3)])
    assert_close_caches(without_padded_states(found), without_padded_states(expected))
    assert PLENTY - caches.room == sum(path.stat().st_size for path in files(tmp_path))
    # A damaged one takes no more room when it is written again, and half of one counts.
    path = file_of(tmp_path, looks[0])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = caches.room
    assert fetch(caches, [0])[1] == [0]
    assert caches.room == before
    path.with_suffix(".part").write_bytes(bytes(1000))
    assert caches.room - KeptCaches(tmp_path, PLENTY).room == 1000
