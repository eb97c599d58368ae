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
FEATURE_CHANNELS = 1280
STRIDE = 32


class GridTowerConfig(PreTrainedConfig):
    """Settings of `GridTower`.

    Attributes:
        image_size: side of the square input in pixels, a multiple of 32.
        patch_size: pixels of the picture that one output position stands for; always 32.
        hidden_size: channels of the output.
        num_hidden_layers: attention layers over the grid.
        num_attention_heads: heads of those layers.
        initializer_range: standard deviation of new weights.
    """

    model_type = "mm_c2c_grid_tower"

    image_size: int = 256
    patch_size: int = STRIDE
    hidden_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    initializer_range: float = 0.02


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads: the odd pixel goes to the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        sizes = []
        for length, kernel, stride in zip(
            input.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            sizes += [total // 2, total - total // 2]
        return super().forward(F.pad(input, sizes))


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
    """`(batch, 3, height, width)` to `(batch, 1280, height / 32, width / 32)`.

    Batch norms are folded into the convolutions: the weights are frozen.
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
        self.head = nn.Conv2d(channels, FEATURE_CHANNELS, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of a batch of pictures, normalised as `(x - 127) / 128`."""
        states = F.relu6(self.stem(pixel_values), inplace=True)
        for block in self.blocks:
            states = block(states)
        return F.relu6(self.head(states), inplace=True)


class GridTower(PreTrainedModel):
    """Frozen convolutions, then attention over their grid, in reading order."""

    config_class = GridTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: GridTowerConfig) -> None:
        super().__init__(config)
        side = config.image_size // STRIDE
        self.convolutions = EfficientNetLite0().requires_grad_(requires_grad=False)
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
        """The frozen part: `(batch, 3, image_size, image_size)` to `(batch, patches, 1280)`."""
        grid = self.convolutions(pixel_values.contiguous(memory_format=torch.channels_last))
        return grid.flatten(2).transpose(1, 2)

    def encode(self, features: Tensor) -> Tensor:
        """The trained part: `(batch, patches, 1280)` to `(batch, patches, hidden_size)`."""
        return self.norm(self.layers(self.embed_norm(self.embed(features)) + self.positions))

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
