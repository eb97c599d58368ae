"""A bridge under the published harnesses; skipped where they are not installed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3ForCausalLM

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, SourceInput, Target
from mm_c2c.errors import ConfigError, InputError, UnsupportedError
from mm_c2c.evaluation.harness import MODEL_NAME, find_bridge, generate
from mm_c2c.sources.text import TextSource

CONTEXTS = ("is it red ?", "Which sticker is above the apple ? answer with one word :")


def randomise(bridge: Bridge, seed: int) -> Bridge:
    """Weights large enough that each question gets words, and others than its neighbour."""
    generator = torch.Generator().manual_seed(seed)
    for weights in bridge.parameters():
        weights.data = torch.randn(weights.shape, generator=generator)
    return bridge.eval()


@pytest.fixture
def text_bridge(
    tiny_target: LlamaForCausalLM,
    tiny_target_tokenizer: PreTrainedTokenizerFast,
    tiny_text_source: Qwen3ForCausalLM,
    tiny_text_source_tokenizer: PreTrainedTokenizerFast,
) -> Bridge:
    """Text to text, with random weights, so that fusing changes what the target says."""
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    source = TextSource(tiny_text_source, tiny_text_source_tokenizer, "tiny-reader")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source="reader", geometry="aligned", fuser=fuser)
    bridge = Bridge(target, {"reader": source}, BridgeConfig(links=(link,), slot_token="a"))
    return randomise(bridge, seed=1)


def lm_eval_model(bridge: Bridge, batch_size: int = 8) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness and what it imports warn of themselves
        pytest.importorskip("lm_eval", reason="make test-harness has lm-eval")
        from mm_c2c.evaluation.harness.lm_eval_model import BridgeLM
    return BridgeLM(bridge, batch_size)


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in args]


@torch.no_grad()
def plain_score(bridge: Bridge, context: str, answer: str) -> tuple[float, bool]:
    """One row, one token at a time, over a cache that this test builds itself."""
    cache = bridge.sources["reader"].prefill([SourceInput(text=context)])
    fused = bridge.fuse(None, [context], {"reader": cache})
    layers = [(layer.keys, layer.values) for layer in fused["past_key_values"].layers]
    past = DynamicCache(layers)
    tokens = bridge.target.tokenizer(answer, add_special_tokens=False)["input_ids"]
    last, total, greedy = fused["input_ids"][:, -1:], 0.0, True
    for token in tokens:
        logits = bridge.target.model(last, past_key_values=past).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
        last = torch.tensor([[token]])
    return total, greedy


def test_a_continuation_scores_as_token_by_token_over_the_fused_cache(text_bridge: Bridge) -> None:
    answers = ("red", "the green apple", "a")
    pairs = [(context, answer) for context in CONTEXTS for answer in answers]
    expected = [plain_score(text_bridge, *pair) for pair in pairs]
    spaced = requests(*[(f"{context} ", f" {answer}") for context, answer in pairs])
    for batch_size in (1, 4, 8):
        found = lm_eval_model(text_bridge, batch_size).loglikelihood(spaced)
        torch.testing.assert_close([s for s, _ in found], [s for s, _ in expected])
        assert [g for _, g in found] == [g for _, g in expected]


def test_what_the_bridge_says_is_greedy_and_fusing_moves_the_scores(text_bridge: Bridge) -> None:
    model = lm_eval_model(text_bridge)
    said = model.generate_until(requests((CONTEXTS[1], {"max_gen_toks": 3})))[0]
    assert said
    ((score, is_greedy),) = model.loglikelihood(requests((CONTEXTS[1], said)))
    assert is_greedy
    for fuser in text_bridge.fusers.values():
        fuser.close()
    ((closed, _),) = model.loglikelihood(requests((CONTEXTS[1], said)))
    assert abs(closed - score) > 1e-3


def test_text_without_a_prompt_is_refused(text_bridge: Bridge, bridge: Bridge) -> None:
    model = lm_eval_model(text_bridge)
    with pytest.raises(UnsupportedError, match="prompt"):
        model.loglikelihood_rolling(requests(("a text",)))
    with pytest.raises(UnsupportedError, match="acc_mutual_info"):
        model.loglikelihood(requests((" ", "red")))
    with pytest.raises(ConfigError, match="no aligned link"):
        lm_eval_model(bridge)
    with pytest.raises(ConfigError, match="batch_size"):
        lm_eval_model(text_bridge, "auto")  # type: ignore[arg-type]


@pytest.mark.parametrize("output", ["multiple_choice", "generate_until"])
@pytest.mark.filterwarnings("ignore")  # the harness warns of itself
def test_a_local_task_runs_through_lm_eval(
    text_bridge: Bridge, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lm_eval_model(text_bridge, 2)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    choices = ["red", "green apple", "two"]
    if output == "multiple_choice":
        read = model.loglikelihood(requests(*[(CONTEXTS[0], f" {c}") for c in choices]))
        gold = choices[max(range(3), key=lambda index: read[index][0])]
        how = {"doc_to_choice": "choices", "metric_list": [{"metric": "acc"}]}
    else:
        settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False, "temperature": 0}
        gold = model.generate_until(requests((CONTEXTS[0], settings)))[0]
        how = {"generation_kwargs": settings, "metric_list": [{"metric": "exact_match"}]}
    rows = [{"question": CONTEXTS[0], "choices": choices, "gold": g} for g in (gold, "no answer")]
    if output == "multiple_choice":  # gold is an index there
        index = choices.index(gold)
        rows = [{**row, "gold": g} for row, g in zip(rows, (index, (index + 1) % 3), strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": output,
        "doc_to_text": "question",
        "doc_to_target": "gold",
        **how,
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = simple_evaluate(model, tasks=["tiny"], task_manager=manager, bootstrap_iters=0)
    metric = "acc,none" if output == "multiple_choice" else "exact_match,none"
    assert result["results"]["tiny"][metric] == 0.5


def test_an_answer_ends_at_the_first_stop_and_batches_change_nothing(text_bridge: Bridge) -> None:
    inputs = [SourceInput(text=context) for context in CONTEXTS * 2]
    settings: list[dict[str, Any]] = [{"max_new_tokens": 6}] * 3 + [{"max_gen_toks": 2}]
    alone = [generate(text_bridge, [i], [s], 1)[0] for i, s in zip(inputs, settings, strict=True)]
    assert generate(text_bridge, inputs, settings, 2) == alone
    assert alone[3] != alone[1]
    stop = alone[0][2]
    (cut,) = generate(text_bridge, inputs[:1], [{"max_new_tokens": 6, "until": ["", stop]}], 1)
    assert cut == alone[0][: alone[0].index(stop)]


def test_a_bridge_is_found_by_the_function_that_makes_it(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm_c2c.reference.models.load_bridge", lambda: bridge)
    assert find_bridge("mm_c2c.reference.models:load_bridge") is bridge
    for wrong in ("nowhere:load", "mm_c2c.reference.models:nothing", "mm_c2c"):
        with pytest.raises(ConfigError, match="module:function"):
            find_bridge(wrong)
    with pytest.raises(ConfigError, match="not a Bridge"):
        find_bridge("builtins:dict")


def lmms_eval_model(bridge: Bridge, pictures: list[Image.Image]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness and what it imports warn of themselves
        pytest.importorskip("lmms_eval", reason="make test-harness has lmms-eval")
        from mm_c2c.evaluation.harness.lmms_eval_model import BridgeLMM
    model = BridgeLMM(bridge, batch_size=2)
    model.task_dict = {"tiny": {"test": pictures}}
    return model


def test_pictures_of_an_lmms_eval_task_reach_the_bridge(
    bridge: Bridge, pictures: list[Image.Image]
) -> None:
    model = lmms_eval_model(bridge, pictures)
    settings = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}

    def asked(doc_id: int, visuals: Any = lambda picture: [picture]) -> tuple[Any, ...]:
        return (CONTEXTS[doc_id], settings, visuals, doc_id, "tiny", "test")

    randomise(bridge, seed=3)
    expected = [
        bridge.generate(bridge.perceive(picture), [text], max_new_tokens=4)[0].strip()
        for picture, text in zip(pictures, CONTEXTS, strict=True)
    ]
    assert expected[0] != expected[1]
    assert model.generate_until(requests(asked(0), asked(1))) == expected
    with pytest.raises(InputError, match="one picture, got Image, Image"):
        model.generate_until(requests(asked(0, lambda picture: [picture, picture])))
    with pytest.raises(InputError, match="one picture, got nothing"):
        model.generate_until(requests(asked(0, lambda picture: [])))


def test_the_entry_point_leads_lmms_eval_to_the_bridge() -> None:
    import tomllib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness and what it imports warn of themselves
        registry_v2 = pytest.importorskip(
            "lmms_eval.models.registry_v2", reason="make test-harness has lmms-eval"
        )
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    from importlib.metadata import EntryPoint

    ((name, value),) = project["project"]["entry-points"]["lmms_eval.models"].items()
    registry = registry_v2.ModelRegistryV2()
    registry.register_manifest(EntryPoint(name, value, "lmms_eval.models").load()())
    assert registry.get_model_class(MODEL_NAME).__name__ == "BridgeLMM"
