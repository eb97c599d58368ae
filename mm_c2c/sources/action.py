"""Action models as sources: images, instruction and state to a cache, and the policy's own actions.

Reading never changes how a policy acts: every read works on a cache and on noise of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from mm_c2c.align.tokens import locate_text
from mm_c2c.cache import (
    CacheOrigin,
    CacheShape,
    PatchGrid,
    PositionKind,
    SourceCache,
    read_layers,
)
from mm_c2c.errors import ConfigError, InputError, UnsupportedError
from mm_c2c.sources import source_class
from mm_c2c.sources.action_bins import ActionBins
from mm_c2c.sources.base import (
    FrozenReader,
    Source,
    SourceInput,
    count_positions,
    full_cache,
)
from mm_c2c.sources.views import place, whole_view
from mm_c2c.sources.vlm import VLMSource, trim_spans


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

    # It has actions, no words.
    answers_in_words = False

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
        if getattr(processor, "state_mean", None) is None:
            raise ConfigError(
                f"{name}: the processor has no statistics of the robot's state; make it with "
                "state_mean and state_std"
            )
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
        patches, grids = place_cameras(is_image, inputs, self._grid(encoded["pixel_values"]))
        return SourceCache(
            layers=layers,
            layer_indices=indices,
            position_ids=position_ids,
            kinds=torch.cat([kinds, tail], dim=1),
            patches=torch.cat([patches, nowhere], dim=1),
            grids=grids,
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
            state=stack_states(inputs, len(self.processor.state_mean)),
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


class TokenActions(NamedTuple):
    """What a policy that writes its actions as tokens did.

    Attributes:
        tokens: `(batch, action_dim)` int64.
        actions: `(batch, action_dim)` float64 on the CPU, in the robot's units.
    """

    tokens: Tensor
    actions: Tensor


class TokenActionSource(VLMSource):
    """A policy of OpenVLA's form: a vision-language model that generates its action token by token.

    K and V of the prompt and of the action tokens; the prompt is the processor's chat template with
    the instruction in it. Proven on a small LLaVA. OpenVLA's own checkpoint is code of its own
    that transformers does not have: port it to a family of `SOURCES` to read it. For another family
    than LLaVA, put this class before the family's: `class Mine(TokenActionSource, PaliGemmaSource)`.

    Args:
        model: as for `VLMSource`.
        processor: its processor.
        bins: what the action tokens mean.
        name: Hub id or folder.
        revision: the Hub's commit, where there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        bins: ActionBins,
        name: str,
        revision: str | None = None,
    ) -> None:
        if not self.reads_on:
            raise UnsupportedError(
                f"{name}: action tokens must follow the prompt, and behind what is kept of it a "
                f"model of type {model.config.model_type} cannot read on; take one over a causal "
                "LM, such as LLaVA, PaliGemma or Qwen-VL"
            )
        super().__init__(model, processor, name, revision)
        self.bins = bins

    @torch.no_grad()
    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Read a batch of observations and the actions that the policy takes there.

        Args:
            inputs: pictures and an instruction each; without `action_tokens`, the policy acts.

        Raises:
            InputError: a row's own tokens are not as many as an action has.
        """
        prompt = super().prefill(inputs)
        tokens = self._given_or_acted(inputs)
        cache = full_cache(self.model)
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            raise UnsupportedError(
                f"{self.origin.model}: linear attention carries the prompt outside of K and V, so "
                "that it cannot be read on from them"
            )
        for index, (keys, values) in zip(prompt.layer_indices, prompt.layers, strict=True):
            cache.update(keys, values, index)
        mask = torch.cat([prompt.kinds != PositionKind.PAD, torch.ones_like(tokens)], dim=1)
        ahead = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        position_ids = prompt.position_ids[..., -1:] + ahead
        self.model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=position_ids,
            past_key_values=cache,
        )
        layers, _ = read_layers(cache)
        nowhere = prompt.patches.new_full((*tokens.shape, 3), -1)
        return replace(
            prompt,
            layers=layers,
            position_ids=torch.cat([prompt.position_ids, position_ids], dim=-1),
            kinds=torch.cat([prompt.kinds, torch.full_like(tokens, PositionKind.ACTION)], dim=1),
            patches=torch.cat([prompt.patches, nowhere], dim=1),
            spans=torch.cat([prompt.spans, nowhere[..., :2]], dim=1),
        )

    def _given_or_acted(self, inputs: Sequence[SourceInput]) -> Tensor:
        """`(batch, action_dim)`: the inputs' own tokens, or what the policy does there."""
        dim, device = len(self.bins.low), self.model.device
        for row, item in enumerate(inputs):
            if item.action_tokens is not None and item.action_tokens.shape != (dim,):
                raise InputError(
                    f"row {row}: expected {dim} action tokens, got "
                    f"{tuple(item.action_tokens.shape)}"
                )
        undecided = [item for item in inputs if item.action_tokens is None]
        acted = iter(self.act(undecided).tokens if undecided else ())
        rows = [next(acted) if i.action_tokens is None else i.action_tokens for i in inputs]
        return torch.stack([row.to(device) for row in rows])

    def entropy(self, inputs: Sequence[SourceInput]) -> Tensor:
        """How unsure the policy is of its own action: `(batch, action_dim)`, in nats."""
        encoded = self._encode(inputs, [self.render(item) for item in inputs])
        out = self._generate(
            encoded,
            max_new_tokens=len(self.bins.low),
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        chances = torch.stack(out.logits, dim=1).float().log_softmax(-1)
        return -(chances.exp() * chances).sum(-1)

    def act(self, inputs: Sequence[SourceInput]) -> TokenActions:
        """The policy's own actions, by greedy `model.generate`.

        Raises:
            UnsupportedError: the model ended a row before its action was complete.
        """
        encoded = self._encode(inputs, [self.render(item) for item in inputs])
        action_dim = len(self.bins.low)
        out = self._generate(encoded, max_new_tokens=action_dim, do_sample=False, num_beams=1)
        tokens = out[:, encoded["input_ids"].shape[1] :]
        stop = self.model.generation_config.eos_token_id
        stops = torch.tensor([] if stop is None else stop, device=tokens.device)
        if tokens.shape[1] != action_dim or torch.isin(tokens, stops).any():
            raise UnsupportedError(
                f"{self.origin.model} ended before the {action_dim} tokens of an action: "
                f"{tokens.tolist()}; is it a policy?"
            )
        return TokenActions(tokens, self.bins.decode(tokens))


def policy_class(kind: type) -> type[TokenActionSource]:
    """The class of a policy with action tokens whose backbone another class reads.

    Raises:
        UnsupportedError: that class has no prompt that could be read on.
    """
    if not issubclass(kind, VLMSource):
        raise UnsupportedError(
            f"the config has n_action_bins, but {kind.__name__} has no prompt of one cache that "
            "action tokens could follow"
        )
    if kind is VLMSource:
        return TokenActionSource
    return type(f"TokenAction{kind.__name__}", (TokenActionSource, kind), {})


def backbone_source(
    policy: nn.Module, processor: ProcessorMixin, name: str, revision: str | None = None
) -> Source:
    """A source over the vision-language backbone of a policy that keeps no cache (GR00T's form).

    Such a policy's action head attends to the backbone's hidden states, so there is no cache to
    take: the source runs the backbone once more with a cache of its own. It holds what the head is
    told of images and instruction; state and actions never enter the backbone, and are not in it.

    Args:
        policy: a module that holds a vision-language model of transformers of a family in
            `SOURCES`; that part is put in evaluation mode and without gradients. Layers that the
            policy has cut off are not missed.
        processor: the backbone's. Its chat template writes the prompt.
        name: the policy's Hub id or folder.
        revision: the Hub's commit, where there is one.

    Raises:
        UnsupportedError: the policy has no such backbone, so neither a cache nor a way to one.
    """
    for module in policy.modules():
        config: Any = getattr(module, "config", None)
        # Towers and decoders have configs too; only the whole has one of each.
        if hasattr(config, "vision_config") and hasattr(config, "text_config"):
            build = source_class(config.model_type, has_vision=True)
            return build(module, processor, name, revision)
    raise UnsupportedError(
        f"{type(policy).__name__} has neither a cache of its own nor a vision-language backbone of "
        "transformers to make one with: there is nothing to read"
    )


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


def place_cameras(
    is_image: Tensor, inputs: Sequence[SourceInput], grid: PatchGrid
) -> tuple[Tensor, tuple[tuple[PatchGrid, ...], ...]]:
    """`patches` and `grids` of a `SourceCache`: each camera is shown whole, one after the other.

    Args:
        is_image: `(batch, seq_len)` bool.
        inputs: the rows, with a picture a camera.
        grid: of every camera.
    """
    view = whole_view(grid.rows, grid.cols)
    return place(is_image, [[(view,)] * len(item.images) for item in inputs])
