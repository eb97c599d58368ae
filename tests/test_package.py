"""The package as a whole: its public names, its import, and the configs that ship with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mm_c2c
from mm_c2c.config import load_config
from mm_c2c.evaluation.run import EvaluationConfig
from mm_c2c.reference.ablate import AblationConfig
from mm_c2c.reference.babyai.train_policy import PolicyTrainingConfig
from mm_c2c.reference.babyai.warm_up_reader import WarmUpConfig
from mm_c2c.reference.metaworld.train_policy import (
    PolicyTrainingConfig as MetaWorldPolicyTrainingConfig,
)
from mm_c2c.reference.train_baseline import BaselineTrainingConfig
from mm_c2c.reference.train_description import DescriptionTrainingConfig
from mm_c2c.reference.train_fuser import FuserTrainingConfig
from mm_c2c.reference.train_source import SourceTrainingConfig
from mm_c2c.training.config import TrainingConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# By the command in its first comment, the dataclass that reads a file.
CONFIG_KINDS = {
    "python -m mm_c2c.reference.ablate": AblationConfig,
    "python -m mm_c2c.reference.train_source": SourceTrainingConfig,
    "python -m mm_c2c.reference.train_fuser": FuserTrainingConfig,
    "python -m mm_c2c.reference.train_baseline": BaselineTrainingConfig,
    "python -m mm_c2c.reference.train_description": DescriptionTrainingConfig,
    "python -m mm_c2c.reference.babyai.train_policy": PolicyTrainingConfig,
    "python -m mm_c2c.reference.babyai.warm_up_reader": WarmUpConfig,
    "python -m mm_c2c.reference.metaworld.train_policy": MetaWorldPolicyTrainingConfig,
    "python -m mm_c2c.reference.train_text": TrainingConfig,
    "mm-c2c train": TrainingConfig,
    "mm-c2c evaluate": EvaluationConfig,
}

IMPORT_CHECK = """
import random
import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

def state():
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
        torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
        transformers.logging.get_verbosity(), sorted(CONFIG_MAPPING.keys()),
    )

before = state()
import mm_c2c
assert state() == before, "importing mm_c2c changed a global setting"
assert "mm_c2c_grid_tower" not in CONFIG_MAPPING
print("unchanged")
"""


def test_public_names_are_sorted_complete_and_importable() -> None:
    names = mm_c2c.__all__
    assert list(names) == sorted(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(mm_c2c, name).__doc__, name
    imported = {
        name
        for name, value in vars(mm_c2c).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("mm_c2c.")
    }
    assert imported == set(names)


def test_importing_changes_nothing_in_torch_or_transformers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHECK],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(mm_c2c.__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "unchanged"


def test_configs_ship() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_how_it_is_used(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    command, file = first.removeprefix("# ").split(" configs/")
    assert file.split()[0] == path.name
    load_config(CONFIG_KINDS[command], path)
