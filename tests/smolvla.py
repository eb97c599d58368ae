"""A tiny SmolVLA: LeRobot's own where that is installed, and a stand-in of the same structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tiny_vlm import build_frozen, train_tokenizer
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

CHUNK = 4
ACTION_DIM = 8
CAMERAS = ("observation.images.front", "observation.images.wrist")


def pair_mask(real: Tensor, blocks: Tensor) -> Tensor:
    """LeRobot's `make_att_2d_masks`: to real positions of the same block and of earlier ones."""
    block = blocks.cumsum(1)
    return (block[:, None] <= block[:, :, None]) & (real[:, None] & real[:, :, None])


def turn(states: Tensor, position_ids: Tensor) -> Tensor:
    """LeRobot's `apply_rope` on `(batch, len, heads, head_dim)`."""
    half = states.shape[-1] // 2
    period = 10_000 ** (2.0 / states.shape[-1] * torch.arange(half))
    angle = (position_ids[..., None] / period)[:, :, None]
    first, second = states.split(half, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class SmolVLMWithExpert(nn.Module):
    """The stand-in's two towers: they share attention, the expert crosses in odd layers."""

    def __init__(self, vlm: SmolVLMForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__()
        self.vlm, self.config = vlm, vlm.config
        self.processor = SimpleNamespace(tokenizer=tokenizer)
        text = vlm.config.text_config
        self.num_vlm_layers = text.num_hidden_layers
        narrow = {**text.to_dict(), "hidden_size": 12, "intermediate_size": 20}
        self.lm_expert = LlamaModel(LlamaConfig(**narrow))
        self.lm_expert.embed_tokens = None
        width = text.num_key_value_heads * text.head_dim
        for layer in self.lm_expert.layers[1::2]:
            layer.self_attn.k_proj = nn.Linear(width, width, bias=False)
            layer.self_attn.v_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: DynamicCache | None,
        inputs_embeds: list[Tensor | None],
        use_cache: bool,
    ) -> tuple[list[Tensor | None], DynamicCache]:
        assert use_cache
        towers = [self.vlm.model.text_model, self.lm_expert]
        tower = 0 if inputs_embeds[1] is None else 1
        states, filling = inputs_embeds[tower], past_key_values is None
        cache = DynamicCache() if past_key_values is None else past_key_values
        for index in range(self.num_vlm_layers):
            layer = towers[tower].layers[index]
            attn, heads = layer.self_attn, (-1, layer.self_attn.head_dim)
            normed = layer.input_layernorm(states)
            query = attn.q_proj(normed).unflatten(-1, heads)
            if filling or index % 2 == 0:
                key = turn(attn.k_proj(normed).unflatten(-1, heads), position_ids)
                value = attn.v_proj(normed).unflatten(-1, heads)
                key, value = cache.update(key.transpose(1, 2), value.transpose(1, 2), index)
                query, seen = turn(query, position_ids), attention_mask
            else:
                flat = [
                    part.transpose(1, 2).flatten(2)
                    for part in (cache.layers[index].keys, cache.layers[index].values)
                ]
                key = attn.k_proj(flat[0]).unflatten(-1, heads).transpose(1, 2)
                value = attn.v_proj(flat[1]).unflatten(-1, heads).transpose(1, 2)
                query = turn(query, position_ids - position_ids.amin(1, keepdim=True))
                seen = attention_mask[..., : key.shape[2]]
            out = nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2), key, value, attn_mask=seen[:, None], enable_gqa=True
            )
            states = states + attn.o_proj(out.transpose(1, 2).flatten(2))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        outputs: list[Tensor | None] = [None, None]
        outputs[tower] = towers[tower].norm(states)
        return outputs, cache


class FlowMatching(nn.Module):
    """The stand-in's `VLAFlowMatching`."""

    def __init__(self, vlm_with_expert: SmolVLMWithExpert, config: Any, *, special: bool) -> None:
        super().__init__()
        self.vlm_with_expert, self.config = vlm_with_expert, config
        self.add_image_special_tokens, self.prefix_length = special, config.prefix_length
        self.state_proj = nn.Linear(config.max_state_dim, 24)
        self.action_in_proj = nn.Linear(config.max_action_dim, 12)
        self.time_in = nn.Linear(13, 12)
        self.action_out_proj = nn.Linear(12, config.max_action_dim)

    def embed_prefix(
        self,
        images: list[Tensor],
        img_masks: list[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        vlm = self.vlm_with_expert.vlm.model
        embed = vlm.text_model.get_input_embeddings()
        parts, real = [], []
        ones = torch.ones(len(state), 1, dtype=torch.bool)
        marker = embed(torch.full((len(state), 1), 3))
        for image, mask in zip(images, img_masks, strict=True):
            seen = vlm.connector(vlm.vision_model(pixel_values=image).last_hidden_state) * 24**0.5
            around = [marker] if self.add_image_special_tokens else []
            parts += [*around * 2, seen, *around]
            real += [ones] * 2 * len(around)
            real += [mask[:, None].expand(-1, seen.shape[1])] + [ones] * len(around)
        parts += [embed(lang_tokens) * 24**0.5, self.state_proj(state)[:, None]]
        real += [lang_masks, ones]
        embeds, real = torch.cat(parts, 1), torch.cat(real, 1)
        blocks = torch.zeros(1, embeds.shape[1])
        blocks[:, -1] = 1
        extra = max(self.prefix_length - embeds.shape[1], 0)
        embeds = nn.functional.pad(embeds, (0, 0, 0, extra))
        real, blocks = (nn.functional.pad(part, (0, extra)) for part in (real, blocks))
        return embeds, real, blocks.expand(len(state), -1)

    def embed_suffix(
        self, noisy_actions: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        actions = self.action_in_proj(noisy_actions)
        time = timestep[:, None, None].expand(-1, actions.shape[1], 1)
        embeds = self.time_in(torch.cat([actions, time], 2))
        real = torch.ones(embeds.shape[:2], dtype=torch.bool)
        return embeds, real, torch.ones(embeds.shape[:2])

    def sample_actions(
        self,
        images: Any,
        img_masks: Any,
        lang: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        noise: Any,
    ) -> Tensor:
        if noise is None:
            noise = torch.randn(len(state), self.config.chunk_size, self.config.max_action_dim)
        embeds, real, blocks = self.embed_prefix(images, img_masks, lang, lang_masks, state)
        _, cache = self.vlm_with_expert(
            pair_mask(real, blocks), real.cumsum(1) - 1, None, [embeds, None], use_cache=True
        )
        for step in range(3):
            suffix, own, blocks = self.embed_suffix(noise, torch.full((len(state),), 1 - step / 3))
            width = suffix.shape[1]
            mask = torch.cat([real[:, None].expand(-1, width, -1), pair_mask(own, blocks)], 2)
            ahead = real.sum(1, keepdim=True) + own.cumsum(1) - 1
            out, _ = self.vlm_with_expert(mask, ahead, cache, [None, suffix], use_cache=True)
            for layer in cache.layers[::2]:
                layer.crop(-width)
            noise = noise - self.action_out_proj(out[1]) / 3
        return noise


class SmolVLA(nn.Module):
    """The stand-in's `SmolVLAPolicy`: what `SmolVLASource` uses of it, by LeRobot's names."""

    def __init__(self, model: FlowMatching) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._queues: dict[str, list[Tensor]] = {"action": []}

    def _prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def prepare_images(self, batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        present = [batch[key] for key in self.config.image_features if key in batch]
        images = [nn.functional.interpolate(image, (28, 28)) * 2 - 1 for image in present]
        real = torch.ones(len(images[0]), dtype=torch.bool)
        empty = len(self.config.image_features) - len(images)
        images += [-torch.ones_like(images[0])] * empty
        return images, [real] * len(present) + [~real] * empty

    def prepare_state(self, batch: dict[str, Any]) -> Tensor:
        state = batch["observation.state"]
        return nn.functional.pad(state, (0, self.config.max_state_dim - state.shape[1]))

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None) -> Tensor:
        images, masks = self.prepare_images(batch)
        return self.model.sample_actions(
            images,
            masks,
            batch["observation.language.tokens"],
            batch["observation.language.attention_mask"].bool(),
            self.prepare_state(batch),
            noise,
        )[..., :5]


class Smol(NamedTuple):
    """A policy and the preprocessor that feeds it."""

    policy: Any
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]


def tiny_vlm() -> tuple[Any, SmolVLMConfig]:
    """The tokenizer and the config of the vision-language model in front of the expert."""
    tokenizer = train_tokenizer(
        ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>"],
        merges=30,
        chat_template=None,
        extra={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
        pad_token="<pad>",
    )
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
        },
        scale_factor=2,
        image_token_id=3,
        pad_token_id=0,
    )
    return tokenizer, config


def build_smol(*, special: bool = False, prefix_length: int = -1) -> Smol:
    """The stand-in: cameras of 2 x 2 patches after merging; 4 layers, 2 KV heads of 6; 4 actions."""
    tokenizer, vlm_config = tiny_vlm()
    config = SimpleNamespace(
        image_features=dict.fromkeys(CAMERAS),
        robot_state_feature=SimpleNamespace(shape=(3,)),
        attention_mode="cross_attn",
        self_attn_every_n_layers=2,
        chunk_size=CHUNK,
        max_state_dim=6,
        max_action_dim=ACTION_DIM,
        prefix_length=prefix_length,
    )
    policy = build_frozen(
        lambda: SmolVLA(
            FlowMatching(
                SmolVLMWithExpert(SmolVLMForConditionalGeneration(vlm_config), tokenizer),
                config,
                special=special,
            )
        ),
        seed=8,
    )

    def preprocess(batch: dict[str, Any]) -> dict[str, Any]:
        lines = [f"{task}\n" for task in batch["task"]]
        words = tokenizer(
            lines,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=24,
            return_tensors="pt",
        )
        return {
            **batch,
            "observation.state": batch["observation.state"] / 2,
            "observation.language.tokens": words["input_ids"],
            "observation.language.attention_mask": words["attention_mask"],
        }

    return Smol(policy, preprocess)


def build_lerobot_smol(folder: Path, *, special: bool = False, prefix_length: int = -1) -> Smol:
    """LeRobot's own policy of the same geometry, with random weights, and its own preprocessor."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokenizer, vlm_config = tiny_vlm()
    vlm_config.save_pretrained(folder)
    parts = (SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor())
    SmolVLMProcessor(*parts, chat_template="").save_pretrained(folder)
    config = SmolVLAConfig(
        input_features={
            CAMERAS[0]: PolicyFeature(type=FeatureType.VISUAL, shape=(3, 40, 56)),
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(3,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(5,))},
        device="cpu",
        vlm_model_name=str(folder),
        resize_imgs_with_padding=(28, 28),
        empty_cameras=1,  # a second one, which may be missing
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=6,
        max_action_dim=ACTION_DIM,
        num_steps=3,
        tokenizer_max_length=24,
        num_vlm_layers=4,
        add_image_special_tokens=special,
        prefix_length=prefix_length,
    )
    policy = build_frozen(lambda: SmolVLAPolicy(config), seed=8)
    stats = {
        name: {"mean": torch.zeros(size), "std": torch.full((size,), 2.0)}
        for name, size in (("observation.state", 3), ("action", 5))
    }
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=stats)
    return Smol(policy, preprocessor)
