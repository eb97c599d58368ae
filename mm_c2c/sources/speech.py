"""Speech models as sources: a recording to the cache that the model's decoder listens to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from mm_c2c.cache import (
    CacheOrigin,
    CacheShape,
    LayerKV,
    PatchGrid,
    PositionKind,
    SourceCache,
    empty_spans,
    read_layers,
)
from mm_c2c.errors import InputError
from mm_c2c.sources.base import SourceInput


class SpeechSource:
    """Whisper (arXiv:2212.04356): K and V of the decoder's cross-attention over the encoder.

    The encoder always hears 30 s: 1,500 positions of 20 ms, those after the recording's end of
    silence. What follows the longest recording of a batch is left out of the cache. Positions of
    sound are AUDIO and stand in a grid of one row, time from left to right, so that whatever pools
    patches pools time; silence is PAD. Keys are not rotated: Whisper's
    positions are added to its states. Any text beside the recording is left unread, as the decoder
    takes no questions.

    Args:
        model: `WhisperForConditionalGeneration` of any size; put in evaluation mode and without
            gradients.
        processor: its `WhisperProcessor`.
        name: Hub id or folder.
        revision: the Hub's commit, where there is one.
    """

    # It writes down what was said, whatever is asked.
    takes_questions = False

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        revision: str | None = None,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(requires_grad=False)
        self.processor: Any = processor
        self.origin = CacheOrigin(name, revision, model.config.model_type)

    @property
    def shape(self) -> CacheShape:
        """Geometry of the caches it writes."""
        config = self.model.config
        heads = config.decoder_attention_heads
        return CacheShape(
            num_layers=config.decoder_layers,
            num_key_value_heads=heads,
            head_dim=config.d_model // heads,
        )

    @property
    def time_spans(self) -> Tensor:
        """`(max_source_positions, 2)` float32: start and end of each position, in seconds."""
        positions = self.model.config.max_source_positions
        edges = torch.arange(positions + 1) * self._samples_per_position
        edges = edges / self.processor.feature_extractor.sampling_rate
        return torch.stack([edges[:-1], edges[1:]], dim=1)

    @torch.no_grad()
    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Listen to a batch of recordings, of any length up to 30 s each.

        Raises:
            InputError: a row has no recording, or one that is not as `SourceInput` says.
        """
        features, counts = self._encode(inputs)
        # Any one token makes the decoder project the encoder's states, in every layer.
        start = torch.full((len(inputs), 1), self.model.config.decoder_start_token_id)
        out = self.model(features, decoder_input_ids=start.to(features.device), use_cache=True)
        layers, indices = read_layers(out.past_key_values.cross_attention_cache)
        batch, seq_len = len(inputs), max(counts)
        layers = tuple(LayerKV(k[:, :, :seq_len], v[:, :, :seq_len]) for k, v in layers)
        times = torch.arange(seq_len, device=features.device).expand(batch, -1)
        is_sound = times < torch.tensor(counts, device=features.device).unsqueeze(1)
        place = torch.stack([torch.zeros_like(times), torch.zeros_like(times), times], dim=2)
        return SourceCache(
            layers=layers,
            layer_indices=indices,
            position_ids=times,
            kinds=torch.where(is_sound, PositionKind.AUDIO, PositionKind.PAD),
            patches=place.masked_fill(~is_sound.unsqueeze(2), -1),
            grids=tuple((PatchGrid(1, count),) for count in counts),
            spans=empty_spans(batch, seq_len).to(features.device),
            texts=("",) * batch,
            rope=(None,) * len(layers),
            origin=self.origin,
        )

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """The model's transcripts."""
        features, _ = self._encode(inputs)
        # All frames are heard, silence too; without a mask transformers warns that it cannot tell.
        heard = torch.ones_like(features[:, 0], dtype=torch.long)
        out = self.model.generate(features, attention_mask=heard, **kwargs)
        return self.processor.tokenizer.batch_decode(out, skip_special_tokens=True)

    @property
    def _samples_per_position(self) -> int:
        # The encoder's second convolution halves the frames of the spectrogram.
        return int(
            self.processor.feature_extractor.hop_length * self.model.model.encoder.conv2.stride[0]
        )

    def _encode(self, inputs: Sequence[SourceInput]) -> tuple[Tensor, list[int]]:
        """Spectrograms `(batch, num_mel_bins, frames)`, and how many positions hold sound."""
        extractor = self.processor.feature_extractor
        limit = self.model.config.max_source_positions * self._samples_per_position
        waves = []
        for row, item in enumerate(inputs):
            if item.audio is None:
                raise InputError(f"row {row}: {self.origin.model} needs a recording, got none")
            wave = torch.as_tensor(item.audio).cpu()
            if wave.ndim != 1 or wave.dtype != torch.float32 or not 0 < len(wave) <= limit:
                raise InputError(
                    f"row {row}: expected a recording of (samples,) float32, at most {limit} "
                    f"({limit / extractor.sampling_rate:g} s at {extractor.sampling_rate} Hz), got "
                    f"{tuple(wave.shape)} {str(wave.dtype).removeprefix('torch.')}"
                )
            if not wave.abs().max() <= 1:  # negated: samples that are no numbers fail too
                raise InputError(f"row {row}: the recording leaves [-1, 1]; scale its samples")
            waves.append(wave.numpy())
        features = extractor(
            waves,
            sampling_rate=extractor.sampling_rate,
            padding="max_length",
            max_length=limit,
            return_tensors="pt",
        )["input_features"]
        counts = [-(-len(wave) // self._samples_per_position) for wave in waves]
        return features.to(self.model.device, self.model.dtype), counts
