"""The whole way of the data, against numbers that were written down."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "golden" / "write_golden.py"


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_golden", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cache_gives_the_logits_that_it_gave(golden: ModuleType) -> None:
    found, expected = golden.fused(), load_file(golden.GOLDEN)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Sums are reordered from one machine to another: some roundings of float32 numbers below 1.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)
