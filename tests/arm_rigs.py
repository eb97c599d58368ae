"""What arms that want a file are given in tests: weights and words that make a difference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_c2c import Bridge, LinkConfig
from mm_c2c.evaluation.arms.own_source import build_own_bridge
from mm_c2c.evaluation.arms.soft_prompt import Connector, ConnectorConfig
from mm_c2c.evaluation.arms.tuned import add_adapter
from mm_c2c.reference.models import SOURCE_NAME


def open_up(module: torch.nn.Module, std: float = 1.0) -> None:
    torch.manual_seed(0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=std)


def connector_of(bridge: Bridge, features: int, parameters: int = 2000) -> Connector:
    connector = Connector(ConnectorConfig.of_budget(features, bridge, parameters))
    open_up(connector)
    return connector


def aligned_bridge(bridge: Bridge) -> Bridge:
    """One link between the words of the same two models, open."""
    slots = bridge.config.links[0]
    words = LinkConfig(source=slots.source, geometry="aligned", fuser=slots.fuser)
    config = dataclasses.replace(bridge.config, links=(words,))
    aligned = Bridge(bridge.target, bridge.sources, config)
    open_up(aligned.fusers)
    return aligned


def make_file(arm: str, bridge: Bridge, folder: Path) -> Path:
    """What the arm wants a file or folder of."""
    if arm == "question_aware_relay":
        winner = {"request": "Of {question}", "options_line": "Choose: {options}."}
        path = folder / "prompts.json"
        path.write_text(json.dumps({"winner": winner}))
        return path
    if arm == "soft_prompt":
        source: Any = bridge.sources[SOURCE_NAME]
        features = source.model.config.vision_config.hidden_size
        connector_of(bridge, features).save_pretrained(folder)
    elif arm == "fused_aligned":
        aligned_bridge(bridge).save_pretrained(folder)
    elif arm == "own_source":
        own = build_own_bridge(bridge, parameters=9000)
        open_up(own.fusers)
        own.save_pretrained(folder)
    else:
        pytest.importorskip("peft", reason="LoRA needs PEFT: the extra `tune`")
        wrapped, _ = add_adapter(bridge.target, 3000)
        trained = [weight for weight in wrapped.parameters() if weight.requires_grad]
        open_up(torch.nn.ParameterList(trained), std=0.5)
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder
