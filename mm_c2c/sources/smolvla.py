"""SmolVLA as a source, through LeRobot, which has to be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from mm_c2c.align.tokens import locate_text, token_spans
from mm_c2c.cache import (
    CacheOrigin,
    CacheShape,
    PatchGrid,
    PositionKind,
    SourceCache,
    read_layers,
)
from mm_c2c.errors import InputError, ShapeError, UnsupportedError
from mm_c2c.rope import RopeSpec
from mm_c2c.sources.action import place_cameras, stack_noise, stack_states
from mm_c2c.sources.base import SourceInput

# LeRobot's names for what a policy sees.
STATE = "observation.state"
TOKENS = "observation.language.tokens"
TOKEN_MASK = "observation.language.attention_mask"
# LeRobot turns keys itself, with this base and not that of SmolVLM's config.
ROPE_THETA = 10_000.0


class SmolVLASource:
    """SmolVLA (arXiv:2506.01844): images, instruction and state, and where it can the actions.

    Written against LeRobot 0.6.1, and tested on its own classes with small random weights. LeRobot
    asks for a transformers older than this library's, with which it can be read all the same, but
    not act: it crops its cache to a length, and transformers by now takes only how much to remove.
    The tests of `act` put the former way back.

    The action expert attends to the prefix alone in some layers, and to the prefix and itself in
    the others, every second one as published. Only the latter keep K and V of the actions, so that
    a cache with actions has those layers only, and one without has all.

    Args:
        policy: `SmolVLAPolicy`; put in evaluation mode and without gradients.
        preprocessor: the first of what LeRobot's `make_pre_post_processors` makes for it: it
            normalises the state and tokenizes the instruction.
        name: Hub id or folder.
        revision: the Hub's commit, where there is one.
        read_actions: read the actions at the first denoising step, timestep 1.0, from noise as
            `PI0Source` has it; False reads the prefix in every layer.
        seed: of the noise that is used where an input brings none.

    Raises:
        UnsupportedError: LeRobot is not installed.
    """

    # It has actions, no words.
    answers_in_words = False

    def __init__(
        self,
        policy: nn.Module,
        preprocessor: Callable[[dict[str, Any]], dict[str, Any]],
        name: str,
        revision: str | None = None,
        *,
        read_actions: bool = True,
        seed: int = 0,
    ) -> None:
        self._pair_mask = _lerobot_smolvla().make_att_2d_masks
        self.policy: Any = policy.eval().requires_grad_(requires_grad=False)
        self.preprocessor = preprocessor
        self.origin = CacheOrigin(name, revision, "smolvla")
        self.read_actions = read_actions
        self.seed = seed

    @property
    def model(self) -> Any:
        """The policy, by the name that other sources have for what they run."""
        return self.policy

    @property
    def shape(self) -> CacheShape:
        """Geometry of the caches it writes."""
        vlm, config = self.policy.model.vlm_with_expert, self.policy.config
        every = config.self_attn_every_n_layers
        layers = range(vlm.num_vlm_layers)
        if self.read_actions and "cross" in config.attention_mode:
            layers = range(0, vlm.num_vlm_layers if every > 0 else 0, max(every, 1))
        text = vlm.config.text_config
        return CacheShape(
            num_layers=len(layers),
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
        )

    @torch.no_grad()
    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Read a batch of observations.

        Raises:
            InputError: a row lacks a picture or a state, or rows differ where they must not.
        """
        policy, model = self.policy, self.policy.model
        batch = policy._prepare_batch(self._preprocess(inputs))
        images, image_masks = policy.prepare_images(batch)
        token_mask = batch[TOKEN_MASK].bool()
        embeds, real, blocks = model.embed_prefix(
            images, image_masks, batch[TOKENS], token_mask, state=policy.prepare_state(batch)
        )
        position_ids = real.cumsum(1) - 1
        _, cache = model.vlm_with_expert.forward(
            attention_mask=self._pair_mask(real, blocks),
            position_ids=position_ids,
            past_key_values=None,
            inputs_embeds=[embeds, None],
            use_cache=True,
        )
        grid = self._grid(images)
        kinds, spans = self._describe(inputs, len(images), grid, token_mask, real)
        if self.read_actions:
            ahead = self._read_actions(inputs, real, cache)
            position_ids = torch.cat([position_ids, ahead], dim=1)
            kinds = torch.cat([kinds, torch.full_like(ahead, PositionKind.ACTION)], dim=1)
            spans = torch.cat([spans, spans.new_full((*ahead.shape, 2), -1)], dim=1)
        patches, grids = place_cameras(kinds == PositionKind.IMAGE, inputs, grid)
        layers, indices = read_layers(cache)
        kept = [i for i, kv in enumerate(layers) if kv.keys.shape[2] == kinds.shape[1]]
        return SourceCache(
            layers=tuple(layers[i] for i in kept),
            layer_indices=tuple(indices[i] for i in kept),
            position_ids=position_ids,
            kinds=kinds,
            patches=patches,
            grids=grids,
            spans=spans,
            texts=tuple(item.text.strip() for item in inputs),
            rope=(_rope(self.shape.head_dim),) * len(kept),
            origin=self.origin,
        )

    def act(self, inputs: Sequence[SourceInput]) -> Tensor:
        """The policy's own actions, from the noise that `prefill` reads it at.

        Returns:
            `(batch, action_horizon, action_dim)` in the policy's normalised units.
        """
        return self.policy.predict_action_chunk(self._preprocess(inputs), noise=self._noise(inputs))

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> NoReturn:
        """Refused: the policy has actions, no words."""
        raise UnsupportedError(f"{self.origin.model} answers with actions, not words; call `act`")

    def _preprocess(self, inputs: Sequence[SourceInput]) -> dict[str, Any]:
        config = self.policy.config
        cameras = list(config.image_features)
        sizes = [tuple(picture.size for picture in item.images) for item in inputs]
        if len(set(sizes)) > 1 or not 0 < len(sizes[0]) <= len(cameras):
            raise InputError(
                f"{self.origin.model} needs the same pictures in every row, one for each of its "
                f"cameras ({', '.join(cameras)}); got sizes {sizes}"
            )
        batch: dict[str, Any] = {
            camera: torch.stack([_to_tensor(item.images[index]) for item in inputs])
            for index, camera in enumerate(cameras[: len(sizes[0])])
        }
        batch[STATE] = stack_states(inputs, config.robot_state_feature.shape[0])
        batch["task"] = [item.text.strip() for item in inputs]
        return self.preprocessor(batch)

    def _noise(self, inputs: Sequence[SourceInput]) -> Tensor:
        config = self.policy.config
        noise = stack_noise(inputs, (config.chunk_size, config.max_action_dim), self.seed)
        return noise.to(self.policy.model.action_in_proj.weight)

    def _grid(self, images: Sequence[Tensor]) -> PatchGrid:
        config = self.policy.model.vlm_with_expert.config
        step = config.vision_config.patch_size * config.scale_factor
        height, width = images[0].shape[-2:]
        return PatchGrid(height // step, width // step)

    def _describe(
        self,
        inputs: Sequence[SourceInput],
        num_images: int,
        grid: PatchGrid,
        token_mask: Tensor,
        real: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Kinds and spans of the prefix, in the order in which `embed_prefix` builds it."""
        model, num_tokens = self.policy.model, token_mask.shape[1]
        camera = [PositionKind.IMAGE] * (grid.rows * grid.cols)
        if model.add_image_special_tokens:  # two before each picture, one after
            camera = [PositionKind.TEMPLATE] * 2 + camera + [PositionKind.TEMPLATE]
        row = camera * num_images + [PositionKind.TEMPLATE] * num_tokens + [PositionKind.STATE]
        first_word = len(camera) * num_images
        if max(len(row), model.prefix_length) != real.shape[1]:
            raise ShapeError(
                f"{self.origin.model}: expected a prefix of {len(row)} positions, or padded to "
                f"{model.prefix_length}, got {real.shape[1]}"
            )
        row += [PositionKind.PAD] * (real.shape[1] - len(row))
        kinds = torch.tensor(row, device=real.device).repeat(len(inputs), 1)
        spans = kinds.new_full((*kinds.shape, 2), -1)
        tokenizer = model.vlm_with_expert.processor.tokenizer
        for index, item in enumerate(inputs):
            rendered = f"{item.text.strip()}\n"
            found = token_spans(tokenizer, rendered, add_special_tokens=True)
            found = locate_text(found, rendered, item.text.strip(), 0)
            found = found[: int(token_mask[index].sum())]  # the preprocessor cuts long ones
            spans[index, first_word : first_word + len(found)] = found.to(spans.device)
        kinds[spans[..., 1] > spans[..., 0]] = PositionKind.TEXT
        kinds[~real.bool()] = PositionKind.PAD
        return kinds, spans

    def _read_actions(self, inputs: Sequence[SourceInput], real: Tensor, cache: Any) -> Tensor:
        """Let the expert add its K and V to the cache; returns its position ids.

        As `denoise_step` does, which crops them off again.
        """
        model, noise = self.policy.model, self._noise(inputs)
        embeds, own, blocks = model.embed_suffix(noise, torch.ones(len(noise), device=noise.device))
        steps = embeds.shape[1]
        before = real.unsqueeze(1).expand(-1, steps, -1)
        ahead = real.sum(1, keepdim=True) + torch.arange(steps, device=real.device)
        model.vlm_with_expert.forward(
            attention_mask=torch.cat([before, self._pair_mask(own, blocks)], dim=2),
            position_ids=ahead,
            past_key_values=cache,
            inputs_embeds=[None, embeds],
            use_cache=True,
        )
        return ahead


def _lerobot_smolvla() -> Any:
    """LeRobot's module of SmolVLA."""
    try:
        return importlib.import_module("lerobot.policies.smolvla.modeling_smolvla")
    except ImportError as error:
        raise UnsupportedError(
            "SmolVLA is read through LeRobot, which cannot be imported: "
            f"{error}; `pip install 'lerobot[smolvla]'` (it needs Python 3.12)"
        ) from error


def _to_tensor(picture: Any) -> Tensor:
    """`(3, height, width)` float32, RGB in [0, 1]."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rope(head_dim: int) -> RopeSpec:
    exponents = torch.arange(head_dim // 2) * (2 / head_dim)
    return RopeSpec(inv_freq=tuple((1 / ROPE_THETA**exponents).tolist()))
