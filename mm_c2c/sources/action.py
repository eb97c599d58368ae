"""Action models as sources: images, instruction and state to a cache, and the policy's own actions.

Reading never changes how a policy acts: every read works on a cache and on noise of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from mm_c2c.align.tokens import locate_text
from mm_c2c.cache import (
    CacheOrigin,
    CacheShape,
    PatchGrid,
    PositionKind,
    SourceCache,
    read_layers,
)
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.sources.base import FrozenReader, SourceInput, count_positions
from mm_c2c.sources.vlm import trim_spans


class PI0Source:
    """pi0 (arXiv:2410.24164): the prefix of images and instruction, then the expert's state and actions.

    The action expert attends to the prefix in every layer, with K and V of the same shape, so one
    cache holds both. The actions are read at the first denoising step, timestep 1.0: the expert is
    given noise and answers with the direction of the whole chunk. The noise is the input's own, or
    drawn once from `torch.Generator().manual_seed(seed)` on the CPU and the same for every row.

    Args:
        model: `PI0ForConditionalGeneration`; put in evaluation mode and without gradients.
        processor: its `PI0Processor`, with the statistics of the robot's state.
        name: Hub id or folder.
        revision: the Hub's commit, where there is one.
        seed: of the noise that is used where an input brings none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        revision: str | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(requires_grad=False)
        self.processor: Any = processor
        self.origin = CacheOrigin(name, revision, model.config.model_type)
        self.seed = seed
        self._prefix = FrozenReader(self.model.model.vlm, name, revision)
        prefix, expert = model.config.vlm_config.text_config, model.config.dit_config
        for key in ("num_hidden_layers", "num_key_value_heads", "head_dim", "rope_parameters"):
            if getattr(prefix, key) != getattr(expert, key):
                raise UnsupportedError(
                    f"{name}: {key} is {getattr(prefix, key)} in the prefix and "
                    f"{getattr(expert, key)} in the action expert; in one cache they must agree"
                )

    @property
    def shape(self) -> CacheShape:
        """Geometry of the caches it writes."""
        return self._prefix.shape

    @torch.no_grad()
    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Read a batch of observations; shorter instructions are padded before the state.

        Raises:
            InputError: a row lacks a picture or a state, or one of them has another size.
        """
        encoded = self._encode(inputs)
        offsets = encoded.pop("offset_mapping")
        mask = encoded["attention_mask"]
        noise = self._noise(inputs)
        # Without a cache the model makes the prefix's itself, and the expert adds to it.
        cache = self.model(
            **encoded, noise=noise, timestep=torch.ones(len(inputs), device=noise.device)
        ).past_key_values
        layers, indices = read_layers(cache)

        is_image = encoded["input_ids"] == self.processor.image_token_id
        spans = torch.stack([self._spans(*row) for row in zip(offsets, inputs, strict=True)])
        kinds = torch.full_like(mask, PositionKind.TEMPLATE)
        kinds[spans[..., 1] > spans[..., 0]] = PositionKind.TEXT
        kinds[is_image] = PositionKind.IMAGE
        kinds[mask == 0] = PositionKind.PAD
        steps = noise.shape[1] + 1
        tail = kinds.new_full((len(inputs), steps), PositionKind.ACTION)
        tail[:, 0] = PositionKind.STATE
        nowhere = spans.new_full((len(inputs), steps, 3), -1)

        position_ids = count_positions(torch.cat([mask, torch.ones_like(tail)], dim=1))
        specs = self._prefix.rope(int(position_ids.max()) + 1)
        grid = self._grid(encoded["pixel_values"])
        return SourceCache(
            layers=layers,
            layer_indices=indices,
            position_ids=position_ids,
            kinds=torch.cat([kinds, tail], dim=1),
            patches=torch.cat([camera_patches(is_image, grid), nowhere], dim=1),
            grids=tuple((grid,) * len(item.images) for item in inputs),
            spans=torch.cat([spans, nowhere[..., :2]], dim=1),
            texts=tuple(item.text.strip() for item in inputs),
            rope=tuple(specs[index] for index in indices),
            origin=self.origin,
        )

    def act(self, inputs: Sequence[SourceInput], **kwargs: Any) -> Tensor:
        """The policy's own actions from the noise that `prefill` reads it at.

        Args:
            inputs: a batch of observations.
            kwargs: for `model.sample_actions`, such as `num_steps`.

        Returns:
            `(batch, action_horizon, action_dim)`, as wide as the model pads them and in its
            normalised units.
        """
        encoded = self._encode(inputs)
        encoded.pop("offset_mapping")
        return self.model.sample_actions(**encoded, noise=self._noise(inputs), **kwargs)

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> NoReturn:
        """Refused: the policy has actions, no words."""
        raise UnsupportedError(f"{self.origin.model} answers with actions, not words; call `act`")

    def _encode(self, inputs: Sequence[SourceInput]) -> dict[str, Tensor]:
        for row, item in enumerate(inputs):
            if not item.images:
                raise InputError(f"row {row}: {self.origin.model} needs a picture, got none")
        encoded = self.processor(
            images=[list(item.images) for item in inputs],
            text=[item.text.strip() for item in inputs],
            state=stack_states(inputs, len(self.processor.state_mean or ())),
            # The processor's own fixed length is too short for the image positions.
            padding=True,
            max_length=None,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        weight = self.model.action_out_proj.weight
        return {
            key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for key, value in encoded.items()
        }

    def _noise(self, inputs: Sequence[SourceInput]) -> Tensor:
        config = self.model.config
        noise = stack_noise(inputs, (config.chunk_size, config.max_action_dim), self.seed)
        return noise.to(self.model.action_out_proj.weight)

    def _spans(self, offsets: Tensor, item: SourceInput) -> Tensor:
        """Characters of the instruction that each position of the prefix covers."""
        processor, text = self.processor, item.text.strip()
        before = processor.image_token * processor.image_seq_length * len(item.images)
        before += processor.tokenizer.bos_token
        rendered = f"{before}{text}\n"
        return locate_text(trim_spans(offsets, rendered), rendered, text, len(before))

    def _grid(self, pixel_values: Tensor) -> PatchGrid:
        patch = self.model.config.vlm_config.vision_config.patch_size
        height, width = pixel_values.shape[-2:]
        return PatchGrid(height // patch, width // patch)


def stack_states(inputs: Sequence[SourceInput], state_dim: int) -> Tensor:
    """`(batch, state_dim)`; every row must have a state of that width."""
    for row, item in enumerate(inputs):
        found = None if item.state is None else tuple(item.state.shape)
        if found != (state_dim,):
            raise InputError(
                f"row {row}: expected a state of ({state_dim},), as the policy's statistics have "
                f"it, got {found}"
            )
    return torch.stack([item.state for item in inputs if item.state is not None]).float()


def stack_noise(inputs: Sequence[SourceInput], shape: tuple[int, int], seed: int) -> Tensor:
    """`(batch, action_horizon, action_dim)`: each row's own noise, or that of the seed."""
    own = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rows = [own if item.noise is None else item.noise for item in inputs]
    for row, noise in enumerate(rows):
        if noise.shape != shape:
            raise InputError(f"row {row}: expected noise of {shape}, got {tuple(noise.shape)}")
    return torch.stack([noise.cpu().float() for noise in rows])


def camera_patches(is_image: Tensor, grid: PatchGrid) -> Tensor:
    """`(batch, seq_len, 3)`: camera, row and column of each patch, in reading order; -1 elsewhere.

    Args:
        is_image: `(batch, seq_len)` bool, one camera after the other.
        grid: of every camera.
    """
    rows, cols = grid.rows, grid.cols
    rank = is_image.cumsum(-1) - 1
    place = torch.stack([rank // (rows * cols), rank // cols % rows, rank % cols], dim=-1)
    return place.masked_fill(~is_image.unsqueeze(-1), -1)
