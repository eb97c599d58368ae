"""The reference source's eyes: a frozen EfficientNet-Lite0, then a few attention layers over its grid.

A vision model of transformers' kind, so that `LlavaForConditionalGeneration` takes it as any other.
Architecture of the convolutions: Tan & Le, arXiv:1905.11946, in its Lite form (ReLU6, no
squeeze-and-excite): https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

_BATCH_NORM_EPSILON = 1e-3


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280
# The last block of each earlier scale. Drawings are told apart by their finer features: a probe on a
# style that training had not seen named 80 % of stickers from the head alone, 86 % with the mean of
# these over a patch, 88 % with their spread too, 90 % with the finest kept at its four places.
_PYRAMID = {2: 24, 4: 40, 7: 80, 10: 112}
_WHOLE = 10
STRIDE = 32
_WHOLE_PLACES = (STRIDE // 16) ** 2
FEATURE_CHANNELS = _HEAD_CHANNELS + 2 * sum(_PYRAMID.values()) + _WHOLE_PLACES * _PYRAMID[_WHOLE]


class GridTowerConfig(PreTrainedConfig):
    """Settings of `GridTower`.

    Attributes:
        image_size: side of the square input in pixels, a multiple of 32.
        patch_size: pixels of the picture that one output position stands for; always 32.
        hidden_size: channels of the output.
        num_hidden_layers: attention layers over the grid.
        num_attention_heads: heads of those layers.
        initializer_range: standard deviation of new weights.
        feature_dropout: share of the frozen features dropped in training.
    """

    model_type = "mm_c2c_grid_tower"

    image_size: int = 288
    patch_size: int = STRIDE
    hidden_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    initializer_range: float = 0.02
    feature_dropout: float = 0.3


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads: the odd pixel goes to the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        sizes = []
        for length, kernel, stride in zip(
            input.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            sizes += [total // 2, total - total // 2]
        left, right, top, bottom = sizes
        if (left, top) != (right, bottom):
            input, top, left = F.pad(input, sizes), 0, 0
        return F.conv2d(input, self.weight, self.bias, self.stride, (top, left), groups=self.groups)


class _Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow."""

    def __init__(self, inputs: int, outputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        wide = inputs * stage.expand
        self.expand = nn.Conv2d(inputs, wide, 1) if stage.expand > 1 else None
        self.depthwise = _SameConv(wide, wide, stage.kernel, stride, groups=wide)
        self.project = nn.Conv2d(wide, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, states: Tensor) -> Tensor:
        wide = states if self.expand is None else F.relu6(self.expand(states), inplace=True)
        narrow = self.project(F.relu6(self.depthwise(wide), inplace=True))
        return states + narrow if self.residual else narrow


class EfficientNetLite0(nn.Module):
    """`(batch, 3, height, width)` to `(batch, 2240, height / 32, width / 32)`.

    Features of the head; of four finer scales, mean and standard deviation over each place of its
    grid; and one of those scales whole, its four places side by side. Batch norms are folded into
    the convolutions: the weights are frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _SameConv(3, _STEM_CHANNELS, 3, 2)
        blocks, channels = [], _STEM_CHANNELS
        for stage in _STAGES:
            for index in range(stage.repeats):
                stride = stage.stride if index == 0 else 1
                blocks.append(_Block(channels, stage.channels, stage, stride))
                channels = stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, _HEAD_CHANNELS, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of a batch of pictures, normalised as `(x - 127) / 128`."""
        states = F.relu6(self.stem(pixel_values), inplace=True)
        finer = {}
        for index, block in enumerate(self.blocks):
            states = block(states)
            if index in _PYRAMID:
                finer[index] = states
        head = F.relu6(self.head(states), inplace=True)
        grid = (head.shape[-2], head.shape[-1])
        means = [F.adaptive_avg_pool2d(level, grid) for level in finer.values()]
        spreads = [
            (F.adaptive_avg_pool2d(level.square(), grid) - mean.square()).clamp_min(0).sqrt()
            for level, mean in zip(finer.values(), means, strict=True)
        ]
        whole = F.pixel_unshuffle(finer[_WHOLE], 2)
        return torch.cat([head, *means, *spreads, whole], dim=1)


class GridTower(PreTrainedModel):
    """Frozen convolutions, then attention over their grid, in reading order."""

    config_class = GridTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: GridTowerConfig) -> None:
        super().__init__(config)
        side = config.image_size // STRIDE
        self.convolutions = EfficientNetLite0().requires_grad_(requires_grad=False)
        self.feature_mean: Tensor
        self.feature_scale: Tensor
        self.register_buffer("feature_mean", torch.zeros(FEATURE_CHANNELS))
        self.register_buffer("feature_scale", torch.ones(FEATURE_CHANNELS))
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        self.embed = nn.Linear(FEATURE_CHANNELS, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size)
        self.positions = nn.Parameter(_grid_waves(side, config.hidden_size))
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            dim_feedforward=4 * config.hidden_size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, config.num_hidden_layers, enable_nested_tensor=False
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Tensor:
        """The frozen part: `(batch, 3, image_size, image_size)` to `(batch, patches, 2240)`."""
        # One by one: what the layers pass on of a picture stays in a CPU's cache.
        grid = torch.cat(
            [
                self.convolutions(picture.contiguous(memory_format=torch.channels_last))
                for picture in pixel_values.split(1)
            ]
        )
        return grid.flatten(2).transpose(1, 2)

    def standardise(self, features: Tensor) -> None:
        """Take mean and spread of each feature from a sample `(pictures, patches, 2240)`."""
        flat = features.flatten(0, 1).float()
        self.feature_mean.copy_(flat.mean(0))
        self.feature_scale.copy_(flat.std(0) + 1e-3)

    def encode(self, features: Tensor) -> Tensor:
        """The trained part: `(batch, patches, 2240)` to `(batch, patches, hidden_size)`."""
        even = self.feature_dropout((features - self.feature_mean) / self.feature_scale)
        return self.norm(self.layers(self.embed_norm(self.embed(even)) + self.positions))

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embed pictures; other arguments, which transformers passes to any tower, change nothing."""
        states = self.encode(self.features(pixel_values))
        return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=(states,))


def _grid_waves(side: int, channels: int) -> Tensor:
    """`(side * side, channels)`: sines and cosines of row and column, unit amplitude."""
    centres = (torch.arange(side) + 0.5) / side
    waves = torch.arange(1, channels // 4 + 1) * (torch.pi / 2) * (side / (channels // 4))
    angles = centres[:, None] * waves
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None].expand(-1, side, -1)
    cols = line[None].expand(side, -1, -1)
    return torch.cat([rows, cols], dim=2).flatten(0, 1)


def register() -> None:
    """Tell transformers' auto classes of the tower; a second call changes nothing."""
    AutoConfig.register(GridTowerConfig.model_type, GridTowerConfig, exist_ok=True)
    AutoModel.register(GridTowerConfig, GridTower, exist_ok=True)


def folded_weights(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `EfficientNetLite0` from the published checkpoint, batch norms folded in.

    Args:
        checkpoint: the state dict of `efficientnet-lite0-57934424.pth`.
    """
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for index in range(sum(stage.repeats for stage in _STAGES)):
        ours, theirs = f"blocks.{index}.", f"_blocks.{index}."
        if theirs + "_expand_conv.weight" in checkpoint:
            pairs.append((ours + "expand", theirs + "_expand_conv", theirs + "_bn0"))
        pairs.append((ours + "depthwise", theirs + "_depthwise_conv", theirs + "_bn1"))
        pairs.append((ours + "project", theirs + "_project_conv", theirs + "_bn2"))
    weights = {}
    for name, conv, norm in pairs:
        scale = checkpoint[norm + ".weight"] / torch.sqrt(
            checkpoint[norm + ".running_var"] + _BATCH_NORM_EPSILON
        )
        weights[name + ".weight"] = checkpoint[conv + ".weight"] * scale[:, None, None, None]
        weights[name + ".bias"] = (
            checkpoint[norm + ".bias"] - checkpoint[norm + ".running_mean"] * scale
        )
    return weights
