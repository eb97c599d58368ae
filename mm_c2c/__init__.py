"""Hand a frozen model's KV cache, not its words, to a frozen text LLM."""

from mm_c2c.align import Alignment
from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.cache import CacheShape, PatchGrid, SourceCache
from mm_c2c.errors import MMC2CError
from mm_c2c.fuser import CacheFuser, FuserConfig
from mm_c2c.link import LinkConfig
from mm_c2c.perception import FusedInputs, Perception
from mm_c2c.sources import Source, SourceInput, load_source, source_class
from mm_c2c.target import Target
from mm_c2c.transport import load_cache, save_cache

__all__ = [
    "Alignment",
    "Bridge",
    "BridgeConfig",
    "CacheFuser",
    "CacheShape",
    "FusedInputs",
    "FuserConfig",
    "LinkConfig",
    "MMC2CError",
    "PatchGrid",
    "Perception",
    "Source",
    "SourceCache",
    "SourceInput",
    "Target",
    "load_cache",
    "load_source",
    "save_cache",
    "source_class",
]
