"""What the fuser is compared with: prompts, a tuned target, a connector, the target itself."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from arm_rigs import connector_of, make_file, open_up
from PIL import Image

from mm_c2c import Bridge, SourceInput
from mm_c2c.errors import ConfigError, InputError, MismatchError, UnsupportedError
from mm_c2c.evaluation.arms import FILES, MAX_NEW_TOKENS, Asked, Setting, build_arm
from mm_c2c.evaluation.arms.own_source import OWN_NAME, build_own_bridge
from mm_c2c.evaluation.arms.prompts import Example, RelayPrompt, read_winner
from mm_c2c.evaluation.arms.soft_prompt import Connector, ConnectorConfig, tower_features
from mm_c2c.evaluation.arms.tuned import add_adapter, import_peft, load_adapter
from mm_c2c.evaluation.prompt_search import PromptSearchConfig, search_prompts, text_table
from mm_c2c.evaluation.run import EvaluationConfig, evaluate
from mm_c2c.fuser import CacheFuser
from mm_c2c.reference import models
from mm_c2c.reference.train_baseline import aligned_loss


@pytest.fixture
def asked(pictures: list[Image.Image]) -> list[Asked]:
    return [
        Asked(SourceInput(images=(picture,)), question, ("cat", "dog"))
        for picture, question in zip(pictures, ("What?", "Where is it?"), strict=False)
    ]


@pytest.fixture
def items(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    """Six items of two kinds."""
    rows = []
    for index in range(6):
        pictures[index % 2].save(tmp_path / f"{index}.png")
        kind, answer = ("what", "cat") if index < 4 else ("where", "left")
        row = {"image": f"{index}.png", "kind": kind, "question": f"Q{index}?", "answer": answer}
        rows.append(json.dumps(row))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    return tmp_path / "items.jsonl"


def setting(bridge: Bridge, **files: Path) -> Setting:
    return Setting(bridge=bridge, source_name=models.SOURCE_NAME, request="Say.", **files)


# --- prompts ---------------------------------------------------------------------------------


def test_a_prompt_words_examples_like_the_question() -> None:
    prompt = RelayPrompt(
        template="{caption} {question}",
        options_line="One of: {options}.",
        examples=(Example(caption="A {dog}.", question="Who?", answer="dog", options=("dog",)),),
    )
    assert prompt.ask_target("A cat.", "What?", ("cat", "hat")) == (
        "A {dog}. Who?\nOne of: dog.\ndog\n\nA cat. What?\nOne of: cat, hat."
    )
    assert prompt.ask_target("A cat.", "What?").endswith("\n\nA cat. What?")
    assert RelayPrompt(request="Look for: {question}").ask_source("A cat?") == "Look for: A cat?"


@pytest.mark.parametrize(
    "changes",
    [{"template": "{caption}"}, {"template": "{caption} {question} {x}"}, {"request": "{"}],
)
def test_a_template_without_its_fields_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"template|fields"):
        RelayPrompt(**changes)


def test_a_search_scores_every_prompt_and_its_winner_serves_the_arm(
    bridge: Bridge, items: Path, tmp_path: Path, asked: list[Asked], monkeypatch: Any
) -> None:
    def reads(bridge: Bridge, prompts: list[str], *_: Any) -> list[str]:
        """A target that gets it right where it is shown examples and `Go`."""
        del bridge
        gold = ["left" if "Q4" in p.split("\n\n")[-1] else "cat" for p in prompts]
        return [
            g if "\n\n" in p and "Go" in p else f"It is a {g}." if "Go" in p else "no"
            for g, p in zip(gold, prompts, strict=True)
        ]

    monkeypatch.setattr("mm_c2c.evaluation.prompt_search.target_answers", reads)
    templates = ("{caption} {question}", "Go {caption} {question}")
    config = PromptSearchConfig(
        items=items, requests=("Say.", "Of {question}"), templates=templates,
        limit=3, examples=2, batch_size=2, resamples=20,
    )  # fmt: skip
    out = tmp_path / "found" / "prompts.json"
    result = search_prompts(bridge, config, out, progress=False)
    assert len(result["table"]) == 2 * 2 * 4
    assert [row["accuracy"][0] for row in result["table"]] == [1.0] * 4 + [0.0] * 12
    assert [row["in_a_sentence"][0] for row in result["table"]] == [1.0] * 8 + [0.0] * 8
    winner = read_winner(out)
    assert winner.template == templates[1]
    # Two kinds, and none of them one of the items scored, which are 0, 2 and 4.
    assert [e.question for e in winner.examples] == ["Q1?", "Q5?"]
    assert "2 examples" in text_table(result)

    out.write_text(json.dumps({"winner": {"request": "Of {question}"}}))
    arm = build_arm("question_aware_relay", setting(bridge, prompts=out))
    requests: list[str] = []
    monkeypatch.setattr(
        bridge.sources[models.SOURCE_NAME],
        "generate",
        lambda looks, **_: [requests.append(look.text) or "seen" for look in looks],
    )
    replies = arm.answer(asked)
    assert requests == ["Of What?", "Of Where is it?"]
    assert [reply.relayed for reply in replies] == ["seen", "seen"]


def test_a_search_wants_examples_that_are_not_scored(bridge: Bridge, items: Path) -> None:
    with pytest.raises(InputError, match="lower limit"):
        search_prompts(bridge, PromptSearchConfig(items=items, limit=5), progress=False)


def test_a_file_of_something_else_is_no_winner(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="mm-c2c prompts"):
        read_winner(tmp_path / "x.json")


# --- a connector -----------------------------------------------------------------------------


def test_a_connector_has_the_parameters_it_was_allowed(bridge: Bridge) -> None:
    connector = connector_of(bridge, features=20, parameters=5000)
    assert abs(sum(p.numel() for p in connector.parameters()) - 5000) < 53
    with pytest.raises(ConfigError, match="too few"):
        ConnectorConfig.of_budget(20, bridge, 40)


def test_a_connector_is_read_as_one_prompt_with_words_in_the_slots(bridge: Bridge) -> None:
    features = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
    connector = connector_of(bridge, 20)
    with torch.no_grad():
        seen = connector.perceive(bridge, features)
        fused = bridge.fuse(seen, ["What is it?", "And where?"])
        model = bridge.target.model
        embeds = model.get_input_embeddings()(fused["input_ids"])
        start = seen.input_ids.shape[1] - 5
        embeds[:, start : start + 5] = connector(features)
        mask = fused["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
        done = seen.input_ids.shape[1]
        pieces = model(
            fused["input_ids"][:, done:],
            attention_mask=mask,
            position_ids=positions[:, done:],
            past_key_values=fused["past_key_values"],
        ).logits
    torch.testing.assert_close(pieces[:, -1], whole[:, -1], rtol=0, atol=1e-5)


def test_a_connector_answers_from_a_folder_row_by_row(
    bridge: Bridge, asked: list[Asked], tmp_path: Path
) -> None:
    features = tower_features(bridge.sources[models.SOURCE_NAME], [a.picture for a in asked])
    connector = connector_of(bridge, features.shape[-1])
    connector.save_pretrained(tmp_path)
    arm = build_arm("soft_prompt", setting(bridge, connector=tmp_path))
    together = arm.answer(asked)
    assert together == [arm.answer([row])[0] for row in asked]
    with torch.no_grad():
        seen = connector.perceive(bridge, features)
    questions = [row.question for row in asked]
    said = bridge.generate(seen, questions, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    assert [reply.answer for reply in together] == [text.strip() for text in said]
    assert len(set(said)) == 2

    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(MismatchError, match="damaged or cut off"):
        Connector.from_pretrained(tmp_path, bridge)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, "target": "another"}))
    with pytest.raises(MismatchError, match="another"):
        Connector.from_pretrained(tmp_path, bridge)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"model\.safetensors is missing"):
        Connector.from_pretrained(tmp_path, bridge)


# --- a tuned target --------------------------------------------------------------------------


@pytest.fixture
def adapter(bridge: Bridge, tmp_path: Path) -> Path:
    """A LoRA with weights that make a difference."""
    return make_file("tuned_relay", bridge, tmp_path)


def test_an_adapter_has_about_the_parameters_it_was_allowed(bridge: Bridge) -> None:
    pytest.importorskip("peft", reason="LoRA needs PEFT: the extra `tune`")
    before = [name for name, _ in bridge.target.model.named_modules()]
    wrapped, model = add_adapter(bridge.target, 5000)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    a_rank = 3 * (64 + 48 + 48 + 64 + 3 * 80)
    assert abs(trained - 5000) <= a_rank / 2
    assert trained % a_rank == 0
    assert [name for name, _ in bridge.target.model.named_modules()] == before
    ids = torch.tensor([[5, 6, 7]])
    assert model(ids).logits.equal(bridge.target.model(ids).logits)  # untrained
    with pytest.raises(ConfigError, match="rank 1"):
        add_adapter(bridge.target, 100)


@pytest.mark.parametrize(
    ("name", "untuned"),
    [("tuned_relay", "caption_relay"), ("tuned_description", "description_and_instruction")],
)
def test_a_tuned_relay_answers_otherwise_and_leaves_the_target_as_it_was(
    name: str, untuned: str, bridge: Bridge, asked: list[Asked], adapter: Path
) -> None:
    asked = [
        row._replace(look=dataclasses.replace(row.look, text="go ."), description="a cat.")
        for row in asked
    ]
    ids = torch.tensor([[5, 6, 7]])
    target = bridge.target.model
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    blind, logits = build_arm("blind", setting(bridge)), target(ids).logits
    said = blind.answer(asked)
    arm = build_arm(name, setting(bridge, **{FILES[name]: adapter}))
    together = arm.answer(asked)
    assert together == [arm.answer([row])[0] for row in asked]
    plain = build_arm(untuned, setting(bridge)).answer(asked)
    for reply, other in zip(together, plain, strict=True):
        assert reply.relayed == other.relayed
        assert reply.answer != other.answer
    _, tuned = load_adapter(bridge.target, adapter)
    assert not torch.allclose(tuned(ids).logits, logits)
    assert tuned.get_input_embeddings().weight is target.get_input_embeddings().weight
    assert target(ids).logits.equal(logits)
    assert blind.answer(asked) == said
    assert before.keys() == target.state_dict().keys()
    assert all(before[name].equal(weight) for name, weight in target.state_dict().items())


def test_an_adapter_of_another_target_is_refused(bridge: Bridge, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    assert json.loads(path.read_text())["base_model_name_or_path"] == bridge.target.origin.model
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "x"}))
    with pytest.raises(MismatchError, match="'x'"):
        load_adapter(bridge.target, adapter)
    path.unlink()
    with pytest.raises(MismatchError, match=r"adapter_config\.json is missing"):
        load_adapter(bridge.target, adapter)


def test_a_missing_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedError, match=r"mm-c2c\[tune\]"):
        import_peft()


# --- the target as its own source ------------------------------------------------------------


def test_the_target_as_its_own_source_sees_no_picture(
    bridge: Bridge, asked: list[Asked], tmp_path: Path
) -> None:
    own = build_own_bridge(bridge, parameters=9000)
    width = own.config.links[0].fuser.hidden_size
    assert own.config.links[0].fuser.rank == round(width * 4 / 16)  # as the other fuser's
    assert sum(p.numel() for p in own.fusers.parameters()) <= 9000
    wider = dataclasses.replace(own.config.links[0].fuser, hidden_size=width + 1)
    assert sum(p.numel() for p in CacheFuser(wider).parameters()) > 9000
    with pytest.raises(ConfigError, match="too few"):
        build_own_bridge(bridge, parameters=100)
    questions = [row.question for row in asked]
    alone = bridge.generate(None, questions, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)

    def answers() -> list[str]:
        own.save_pretrained(tmp_path)
        arm = build_arm("own_source", setting(bridge, own_bridge=tmp_path))
        said = arm.answer(asked)
        assert said == [arm.answer([row])[0] for row in asked]
        other = [
            row._replace(look=SourceInput(images=(Image.new("RGB", (8, 8)),))) for row in asked
        ]
        assert said == arm.answer(other)
        assert {reply.relayed for reply in said} == {None}
        assert len({reply.answer for reply in said}) == 2
        return [reply.answer for reply in said]

    assert answers() == [text.strip() for text in alone]  # untrained
    open_up(own.fusers)
    assert answers() != [text.strip() for text in alone]


def test_an_aligned_training_counts_each_answer_token_over_the_fused_cache(bridge: Bridge) -> None:
    own = build_own_bridge(bridge, parameters=9000).eval()
    open_up(own.fusers, std=0.5)
    questions, answers = ["is it red ?", "where ?"], ["the green apple", "left"]
    losses = []
    for question, answer in zip(questions, answers, strict=True):
        cache = own.sources[OWN_NAME].prefill([SourceInput(text=question)])
        fused = own.fuse(None, [question], {OWN_NAME: cache})
        tokenizer = bridge.target.tokenizer
        ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        last, past = fused["input_ids"][:, -1:], fused["past_key_values"]
        for token in ids:
            logits = bridge.target.model(last, past_key_values=past).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[token])
            last = torch.tensor([[token]])
    cache = own.sources[OWN_NAME].prefill([SourceInput(text=q) for q in questions])
    found = aligned_loss(own, {OWN_NAME: cache}, questions, answers)
    torch.testing.assert_close(found, torch.stack(losses).mean())
    found.backward()
    assert all(param.grad is not None for param in own.fusers.parameters())


# --- in an evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_an_arm_says_which_file_it_wants(name: str, bridge: Bridge) -> None:
    with pytest.raises(ConfigError, match=f"wants `{FILES[name]}=PATH`"):
        build_arm(name, setting(bridge))


def test_an_evaluation_runs_what_it_is_given_files_for(
    bridge: Bridge, items: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "connector"
    features = bridge.sources[models.SOURCE_NAME].model.config.vision_config.hidden_size
    connector = connector_of(bridge, features)
    connector.save_pretrained(folder)
    config = EvaluationConfig(items=items, connector=folder, batch_size=2, timed=0, resamples=20)
    summary = evaluate(bridge, config, tmp_path / "run", progress=False)
    assert "soft_prompt" in summary["arms"]
    assert {"tuned_relay", "question_aware_relay"}.isdisjoint(summary["arms"])
    open_up(connector, std=2.0)
    connector.save_pretrained(folder)
    with pytest.raises(ConfigError, match="connector differ"):
        evaluate(bridge, config, tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="does not exist"):
        evaluate(bridge, dataclasses.replace(config, prompts=tmp_path / "none"), progress=False)
