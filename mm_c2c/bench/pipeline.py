"""What a bridge's stages take, from the words to the first token, on models of random weights.

The source reads, the target reads, the one is fused into the other, the target says one token:
through a `Bridge` with our fuser, and with the paper's projector in its place.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mm_c2c.align.layers import layer_pairs
from mm_c2c.bench.peer import LayerByLayer
from mm_c2c.bench.rounds import in_turn, ratio
from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.cache import CacheShape, LayerKV, SourceCache, read_layers, with_layers
from mm_c2c.fuser import FuserConfig
from mm_c2c.geometry import Geometry
from mm_c2c.link import LinkConfig
from mm_c2c.perception import FusedInputs, Reading
from mm_c2c.sources.base import SourceInput
from mm_c2c.training.blank import BlankSource, blank_target

_NAME = "source"
_FUSED = ("fusing", "first token")
_PEER = ("the peer's fusing", "first token after it")


class Pipeline:
    """The stages of one pair, each of which goes on from what the one before it left.

    Args:
        source: the model that is read.
        target: the model that answers; all its layers have one layer's weights.
        positions: words, of a token each, that both read.
        hidden_size: width of the peer's projectors.
        dtype: of both models; the fusers are in float32.
        true_width: False makes the models narrow, for a test.
    """

    def __init__(
        self,
        source: Geometry,
        target: Geometry,
        *,
        positions: int,
        hidden_size: int,
        dtype: str,
        true_width: bool,
    ) -> None:
        self.words = "x" * positions
        self.target = blank_target(target, dtype, true_width=true_width, shared=True)
        published = FuserConfig(source=source.layout.shape, target=target.layout.shape)
        self.link = LinkConfig(source=_NAME, geometry="aligned", fuser=published)
        self.source = BlankSource(source, [self.link], dtype, true_width=true_width)
        shapes = self.source.shape, self.target.shape
        self.link = replace(self.link, fuser=FuserConfig(source=shapes[0], target=shapes[1]))
        self.bridge = self.build([self.link])
        self.peer = LayerByLayer(*shapes, hidden_size, paired_layers(*shapes)).eval()
        # What the stages leave behind; any of the right kind until they have run.
        self.seen: SourceCache
        self.reading: Reading
        self.fused: FusedInputs

    def build(self, links: Sequence[LinkConfig]) -> Bridge:
        """A bridge between the two by other links, whatever names they give the source."""
        named: dict[str, Any] = {link.source: self.source for link in links}
        return Bridge(self.target, named, BridgeConfig(links=tuple(links), slot_token="@")).eval()

    def look(self) -> None:
        """The source reads."""
        self.seen = self.source.prefill([SourceInput(text=self.words)])

    def read(self) -> None:
        """The target reads, all but the last token."""
        self.reading = self.bridge.read_questions([self.words])

    def fuse(self) -> None:
        """Our bridge aligns, fuses and writes."""
        self.fused = self.bridge.fuse_words(self.reading, {_NAME: self.seen})

    def fuse_by_peer(self) -> None:
        """The peer fuses the same words; which of them belong together it is told."""
        own, indices = read_layers(self.reading.past_key_values)
        theirs, mine = (_words(spans) for spans in (self.seen.spans, self.reading.spans))
        written = {}
        for layer, pair in enumerate(self.peer.pairs):
            if pair is None:
                continue
            fused = []
            for part, projectors in enumerate((self.peer.keys, self.peer.values)):
                states = own[layer][part]
                seen = self.seen.layers[pair][part][:, :, theirs]
                new = projectors[layer](_flat(seen), _flat(states[:, :, mine]))
                kept = states.clone()
                kept[:, :, mine] = (
                    new.unflatten(2, (states.shape[1], -1)).transpose(1, 2).to(states)
                )
                fused.append(kept)
            written[indices[layer]] = LayerKV(*fused)
        cache = with_layers(self.reading.past_key_values, written)
        self.fused = self.reading._replace(past_key_values=cache).inputs

    def decode(self) -> Tensor:
        """The target's first token."""
        return self.target.generate(self.fused, max_new_tokens=1, do_sample=False)


def paired_layers(source: CacheShape, target: CacheShape) -> list[int | None]:
    """The paper's layer of the source for each of the target; None where it has none."""
    pairs = layer_pairs("terminal", source.num_layers, target.num_layers)
    return [pairs.get(layer) for layer in range(target.num_layers)]


@torch.no_grad()
def time_stages(pipeline: Pipeline, rounds: int, label: str, *, progress: bool) -> dict[str, Any]:
    """Time every stage, ours and the peer's, in turn.

    Returns:
        Plain values: `ms`, the median of each stage; `first_token`, how many times as fast as with
        the peer's fusing all of it is, and `share`, of fusing in the two readings, both as
        [median, low, high] of the rounds.
    """
    stages: dict[str, Callable[[], object]] = {
        "source reads": pipeline.look,
        "target reads": pipeline.read,
        _FUSED[0]: pipeline.fuse,
        _FUSED[1]: pipeline.decode,
        _PEER[0]: pipeline.fuse_by_peer,
        _PEER[1]: pipeline.decode,
    }
    taken = in_turn(stages, rounds, label, progress=progress)
    read = _add(taken["source reads"], taken["target reads"])
    ours, peers = (_add(read, *(taken[name] for name in names)) for names in (_FUSED, _PEER))
    return {
        "ms": {name: statistics.median(times) for name, times in taken.items()},
        "first_token": ratio(peers, ours),
        "share": ratio(taken["fusing"], read),
    }


@torch.no_grad()
def time_growth(
    pipeline: Pipeline, sides: Sequence[int], sources: Sequence[int], rounds: int, *, progress: bool
) -> dict[str, dict[str, float]]:
    """Milliseconds in which a bridge fuses.

    Args:
        pipeline: whose source sees pictures.
        sides: numbers of rows, and of columns, of slots.
        sources: numbers of sources that have read the same words.
        rounds: timed rounds.
        progress: whether to show a bar.

    Returns:
        Medians by number of `slots` and of `sources`.
    """
    slots: dict[str, Callable[[], object]] = {}
    picture = pipeline.source.prefill([SourceInput()])
    for side in sides:
        link = replace(pipeline.link, geometry="slots", rows=side, cols=side)
        bridge = pipeline.build([link])
        slots[str(side**2)] = functools.partial(bridge.fuse_slots, {_NAME: picture})
    words: dict[str, Callable[[], object]] = {}
    pipeline.look()
    pipeline.read()
    for count in sources:
        links = [replace(pipeline.link, source=f"{_NAME}{number}") for number in range(count)]
        caches = {link.source: pipeline.seen for link in links}
        bridge = pipeline.build(links)
        words[str(count)] = functools.partial(bridge.fuse_words, pipeline.reading, caches)
    return {
        name: {
            count: statistics.median(times)
            for count, times in in_turn(runs, rounds, name, progress=progress).items()
        }
        for name, runs in (("slots", slots), ("sources", words))
    }


def _words(spans: Tensor) -> slice:
    """Where the words stand, which follow each other without a gap."""
    (places,) = (spans[0, :, 0] >= 0).nonzero(as_tuple=True)
    return slice(int(places[0]), int(places[-1]) + 1)


def _flat(states: Tensor) -> Tensor:
    """`(batch, heads, len, head_dim)` to `(batch, len, heads * head_dim)` in float32."""
    return states.transpose(1, 2).flatten(2).float()


def _add(*times: Sequence[float]) -> list[float]:
    return [sum(parts) for parts in zip(*times, strict=True)]
