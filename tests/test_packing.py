"""Questions packed behind one picture: the same as each of them alone."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mm_c2c import Bridge, Target
from mm_c2c.cache import fork
from mm_c2c.errors import UnsupportedError
from mm_c2c.reference.scenes import Question
from mm_c2c.reference.train_fuser import answer_loss, turns_loss
from mm_c2c.training.packing import Turn, block_mask, check_packs, pack, split_beginning


def test_each_question_starts_behind_the_prefix_and_answers_for_itself() -> None:
    packed = pack([[Turn([5, 6], [7, 8]), Turn([9], [4])], [Turn([3], [2, 1])]], prefix_len=10)
    assert packed.input_ids.tolist() == [[5, 6, 7, 9], [3, 2, 0, 0]]
    assert packed.segments.tolist() == [[0, 0, 0, 1], [0, 0, -1, -1]]
    assert packed.position_ids.tolist() == [[10, 11, 12, 10], [10, 11, 0, 0]]
    assert packed.labels.tolist() == [[-100, 7, 8, 4], [2, 1, -100, -100]]


@pytest.mark.parametrize("done", [0, 3])
def test_a_beginning_that_questions_share_is_read_once_for_the_same_loss(
    bridge: Bridge, done: int
) -> None:
    model = bridge.target.model
    ids = torch.randint(3, 30, (2, 3), generator=torch.Generator().manual_seed(0))
    model_cache = model(ids, use_cache=True).past_key_values

    def loss(turns: list[list[Turn]], beginnings: list[list[int]] | None = None) -> float:
        cache = fork(model_cache) if done else DynamicCache(config=model.config)
        return turns_loss(model, turns, cache, done, beginnings).item()

    apart = [[Turn([5, 6, 7], [8, 3]), Turn([5, 6, 9, 4], [7])], [Turn([4, 3], [2, 1])]]
    shared = [[Turn([7], [8, 3]), Turn([9, 4], [7])], [Turn([4, 3], [2, 1])]]
    with torch.inference_mode():
        assert loss(shared, [[5, 6], []]) == pytest.approx(loss(apart), abs=1e-6)
        assert loss(shared, [[5, 7], []]) != pytest.approx(loss(apart), abs=1e-6)


def test_prompts_are_parted_where_they_differ_or_at_their_last_token() -> None:
    assert split_beginning([[1, 2, 3], [1, 2, 4, 5]]) == ([1, 2], [[3], [4, 5]])
    assert split_beginning([[1, 2], [1, 2, 3]]) == ([1], [[2], [2, 3]])
    assert split_beginning([[1, 2, 3]]) == ([1, 2], [[3]])
    assert split_beginning([[1], [2]]) == ([], [[1], [2]])


def tiny(model_type: str, tokenizer: Any, **more: Any) -> Target:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )
    return Target(AutoModelForCausalLM.from_config(config).eval(), tokenizer, model_type)


def test_models_are_packed_for_only_where_that_is_exact(tiny_target_tokenizer: Any) -> None:
    check_packs(tiny("llama", tiny_target_tokenizer))
    with pytest.raises(UnsupportedError, match=r"scales or caps its logits.*leave packed at false"):
        check_packs(tiny("granite", tiny_target_tokenizer, logits_scaling=4.0))
    with pytest.raises(UnsupportedError, match=r"see a window or are recurrent.*leave packed"):
        check_packs(tiny("gemma3_text", tiny_target_tokenizer, head_dim=8, sliding_window=4))


def test_the_mask_is_made_where_the_questions_are() -> None:
    assert block_mask(torch.zeros(1, 3, device="meta"), prefix_len=2).device.type == "meta"


def test_a_token_sees_the_prefix_and_what_came_before_in_its_own_question() -> None:
    mask = block_mask(torch.tensor([[0, 0, 1]]), prefix_len=2)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def open_up(bridge: Bridge) -> None:
    """Weights by which a picture makes a difference."""
    torch.manual_seed(0)
    for weight in bridge.fusers.parameters():
        torch.nn.init.normal_(weight, std=2.0)


@pytest.mark.parametrize("counts", [(1, 3), (3, 2)])
def test_packed_answers_cost_what_they_cost_one_by_one(
    bridge: Bridge, pictures: list[Image.Image], counts: tuple[int, int]
) -> None:
    open_up(bridge)
    pool = [
        Question("what", "what is in the image", "cat"),
        Question("where", "what is left", "a red square"),
        Question("count", "is it a blue circle or a square", "yes"),
    ]
    asked = [pool[: counts[0]], pool[: counts[1]]]
    seen = bridge.perceive(pictures[:2])
    packed = answer_loss(bridge, seen, asked)

    tokenizer, model = bridge.target.tokenizer, bridge.target.model
    losses = []
    for picture, questions in zip(pictures, asked, strict=False):
        for question in questions:
            fused = bridge.fuse(bridge.perceive(picture), [question.question])
            answer = [
                *tokenizer(question.answer, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            ids = torch.cat([fused["input_ids"], torch.tensor([answer])], dim=1)
            done = seen.input_ids.shape[1]
            logits = model(ids[:, done:], past_key_values=fork(fused["past_key_values"])).logits
            said = logits[0, -len(answer) - 1 : -1]
            losses += F.cross_entropy(said, torch.tensor(answer), reduction="none").tolist()
    torch.testing.assert_close(packed.item(), sum(losses) / len(losses), rtol=0, atol=5e-6)
    swapped = answer_loss(bridge, bridge.perceive(pictures[1::-1]), asked)
    assert abs(swapped.item() - packed.item()) > 2e-5  # the pictures matter
