"""What the page does, without a browser, on a tiny pair; the layout where Gradio is installed."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mm_c2c import Bridge, SourceInput
from mm_c2c.demo.compare import Look, _Live, check_question, columns_html, compare
from mm_c2c.demo.pair import open_picture
from mm_c2c.errors import InputError
from mm_c2c.evaluation.arms import MAX_NEW_TOKENS, Asked, Setting, build_arm
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.reference.scenes import CAPTION_REQUEST


@pytest.fixture
def look(bridge: Bridge, pictures: list[Image.Image]) -> Look:
    setting = Setting(bridge=bridge, source_name=SOURCE_NAME, request=CAPTION_REQUEST)
    return Look(setting, pictures[0])


def test_columns_end_with_what_the_arms_answer(bridge: Bridge, look: Look) -> None:
    *_, columns = compare(look, "Where is it?", ["left", "right"])
    asked = Asked(SourceInput(images=(look.picture,)), "Where is it?", ("left", "right"))
    assert next(iter(columns)) == "fused"
    for name, column in columns.items():
        assert column.text == build_arm(name, look.setting).answer([asked])[0].answer


def test_a_second_question_perceives_and_captions_nothing_again(
    bridge: Bridge, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(compare(look, "Where is it?"))
    source = look.setting.source
    monkeypatch.setattr(source, "prefill", lambda inputs: pytest.fail("perceived again"))
    begin = bridge.fuse_slots({})  # what stands before every prompt
    monkeypatch.setattr(
        bridge, "fuse_slots", lambda caches: pytest.fail("fused again") if caches else begin
    )
    written = []
    generate = source.generate

    def count(inputs, **kwargs):
        written.append(inputs[0].text)
        return generate(inputs, **kwargs)

    monkeypatch.setattr(source, "generate", count)
    *_, columns = compare(look, "What is it?")
    assert written == ["What is it?"]
    assert look.perceived == 1
    assert "perceived <b>once</b>" in columns_html(columns, look)


def test_a_column_says_what_was_handed_over(bridge: Bridge, look: Look) -> None:
    *_, columns = compare(look, "Where is it?")
    assert "caption_relay_options" not in columns
    assert columns["fused"].positions == 4
    assert columns["fused"].num_bytes == look.cache.num_bytes > 0
    relayed = columns["caption_relay"].answer.relayed
    assert columns["caption_relay"].num_bytes == len(relayed.encode())
    assert columns["caption_relay"].positions > 0
    assert (columns["blind"].positions, columns["blind"].num_bytes) == (0, 0)


def test_an_answer_that_the_limit_cut_says_so(
    bridge: Bridge, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, columns = compare(look, "Where is it?")
    blind = columns["blind"]  # random weights never end by themselves
    assert blind.is_cut
    assert f"(cut after {MAX_NEW_TOKENS} tokens)" in columns_html({"blind": blind}, look)
    model = bridge.target.model
    last = bridge.target.tokenizer.eos_token_id
    monkeypatch.setattr(model, "lm_head", _Always(last, model.config.vocab_size))
    *_, columns = compare(look, "Where is it?")
    assert not columns["blind"].is_cut
    assert "cut after" not in columns_html({"blind": columns["blind"]}, look)


def test_tokens_of_a_caption_are_counted_where_it_was_written(look: Look) -> None:
    *_, columns = compare(look, "Where is it?", ["left", "right"])
    generic, again = columns["caption_relay"].answer, columns["caption_relay_options"].answer
    tokenizer = look.setting.bridge.target.tokenizer
    assert again.tokens == len(tokenizer(again.answer)["input_ids"])
    assert generic.tokens > len(tokenizer(generic.answer)["input_ids"])


class _Always(torch.nn.Module):
    """A head that thinks of one token only."""

    def __init__(self, token: int, vocabulary: int) -> None:
        super().__init__()
        self.logits = torch.zeros(vocabulary).index_fill(0, torch.tensor([token]), 9.0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*states.shape[:-1], -1)


def test_closing_a_comparison_stops_the_arm(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    put = _Live.put

    def write(live: _Live, value: torch.Tensor) -> None:
        written.append(value)
        if len(written) == 3:  # the prompt, a token, and one that comes after the close
            live.stopped.wait(30)
        put(live, value)

    monkeypatch.setattr(_Live, "put", write)
    running = compare(look, "Where is it?")
    assert [next(running)["fused"].text != "" for _ in range(2)] == [False, True]
    running.close()
    assert len(written) == 3
    *_, columns = compare(look, "Where is it?")
    assert columns["source"].answer is not None


def test_what_models_write_cannot_become_markup(bridge: Bridge, look: Look) -> None:
    from mm_c2c.demo.compare import Column

    assert "<script>" not in columns_html({"blind": Column("<script>")}, look)


@pytest.mark.parametrize(
    ("question", "message"), [("  ", "is empty"), (None, "is empty"), ("a" * 301, "at most 300")]
)
def test_questions_that_cannot_be_asked_say_what_to_do(question: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_question(question)


def test_a_broken_upload_is_refused_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "junk.png").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"^junk.png is not a picture"):
        open_picture(str(tmp_path / "junk.png"))
    with pytest.raises(InputError, match="pick a scene"):
        open_picture(None)
