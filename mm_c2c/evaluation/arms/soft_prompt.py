"""A connector as LLaVA has it: the vision tower's patches become words of the frozen target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from mm_c2c.bridge import Bridge
from mm_c2c.cache import repeat_rows
from mm_c2c.config import from_dict
from mm_c2c.errors import ConfigError, MismatchError, UnsupportedError
from mm_c2c.evaluation.arms import Asked, Reply, Setting
from mm_c2c.perception import Perception
from mm_c2c.pretrained import read_weights, write_tensors
from mm_c2c.sources.base import Source

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """The shape of a `Connector`.

    Attributes:
        features: channels of the vision tower.
        embeddings: width of the target's embeddings.
        hidden_size: between both layers.
        target: which model it was trained for.
    """

    features: int
    embeddings: int
    hidden_size: int
    target: str

    @classmethod
    def of_budget(cls, features: int, bridge: Bridge, parameters: int) -> ConnectorConfig:
        """As wide as a number of parameters allows.

        Args:
            features: channels of the vision tower.
            bridge: with the target.
            parameters: about so many.
        """
        embeddings = bridge.target.model.get_input_embeddings().embedding_dim
        width = round((parameters - embeddings) / (features + embeddings + 1))
        if width < 1:
            raise ConfigError(f"parameters={parameters} is too few for a connector of width 1")
        return cls(
            features=features,
            embeddings=embeddings,
            hidden_size=width,
            target=bridge.target.origin.model,
        )


class Connector(nn.Module):
    """Two linear layers, GELU between them (Liu et al., arXiv:2310.03744)."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            nn.Linear(config.features, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.embeddings),
        )

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, patches, features)` to `(batch, patches, embeddings)`."""
        return self.layers(features)

    def perceive(self, bridge: Bridge, features: Tensor) -> Perception:
        """The target's prompt with one slot a patch, read up to the last slot.

        Args:
            bridge: with the target, whose fusers take no part.
            features: `(batch, patches, features)`, of the vision tower.
        """
        batch, patches = features.shape[:2]
        before = bridge.fuse_slots({})
        start = before.input_ids.shape[1]
        cache = repeat_rows(before.past_key_values, batch)
        model = bridge.target.model
        places = torch.arange(start, start + patches, device=bridge.device)
        model(
            inputs_embeds=self(features).to(model.dtype),
            position_ids=places.expand(batch, -1),
            past_key_values=cache,
            **bridge.target.spared,
        )
        # The ids stand for the slots in `input_ids` only: what was read are the embeddings.
        (slot,) = bridge.target.tokenizer(bridge.config.slot_token, add_special_tokens=False)[
            "input_ids"
        ]
        slots = before.input_ids.new_full((batch, patches), slot)
        return Perception(torch.cat([before.input_ids.expand(batch, -1), slots], dim=1), cache)

    def save_pretrained(self, folder: Path) -> None:
        """Write the shape and the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / _WEIGHTS, self.state_dict())
        text = json.dumps(asdict(self.config), indent=2) + "\n"
        (folder / _CONFIG).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: Path, bridge: Bridge) -> Connector:
        """Load a connector for exactly the target it was trained for.

        Raises:
            MismatchError: files are missing or damaged, or it belongs to another target.
        """
        missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise MismatchError(f"{folder} is no saved connector: {', '.join(missing)} is missing")
        found = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        connector = cls(from_dict(ConnectorConfig, found))
        if connector.config.target != bridge.target.origin.model:
            raise MismatchError(
                f"{folder}: the connector was trained for {connector.config.target!r}, got "
                f"{bridge.target.origin.model!r}"
            )
        connector.load_state_dict(read_weights(folder / _WEIGHTS, connector))
        return connector.eval()


@dataclass(frozen=True)
class SoftPrompt:
    """The target reads the vision tower's patches as words; the source's decoder takes no part."""

    setting: Setting

    @torch.no_grad()
    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        bridge = self.setting.bridge
        features = tower_features(self.setting.source, [row.picture for row in asked])
        seen = self.connector.perceive(bridge, features)
        decoding = self.setting.decoding(asked, streamer)
        answers = bridge.generate(seen, [row.question for row in asked], **decoding)
        return [Reply(text.strip()) for text in answers]

    @cached_property
    def connector(self) -> Connector:
        """The trained connector."""
        folder = self.setting.file_of("soft_prompt")
        return Connector.from_pretrained(folder, self.setting.bridge).to(self.setting.bridge.device)


def tower_features(source: Source, pictures: Sequence[Image.Image]) -> Tensor:
    """`(batch, patches, channels)`: the last states of a source's vision tower.

    Raises:
        UnsupportedError: the source has none that takes pictures of one size.
    """
    reader: Any = source
    tower = getattr(reader.model.base_model, "vision_tower", None)
    if tower is None:
        raise UnsupportedError(
            f"{source} has no `vision_tower`; the arm 'soft_prompt' wants a source of LLaVA's form"
        )
    pixels = reader.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    return tower(pixels.to(reader.model.device, reader.model.dtype)).last_hidden_state
