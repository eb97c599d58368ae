"""A text to text bridge under lm-evaluation-harness.

    python -m mm_c2c.evaluation.harness.lm_eval_model --model mm_c2c \
        --model_args bridge=my_package:load_bridge --tasks openbookqa

which is `lm_eval` with this model registered: the harness finds no model by itself that it does
not carry. Both models read the context, each in its own chat template (leave `--apply_chat_template`
out), and the target answers over the fused cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm_c2c.bridge import Bridge
from mm_c2c.errors import ConfigError, UnsupportedError
from mm_c2c.evaluation.harness import MODEL_NAME, check_batch_size, find_bridge, generate, read
from mm_c2c.sources.base import SourceInput

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(f"{error}; install it with: pip install 'mm-c2c[lm-eval]'") from error


@register_model(MODEL_NAME)
class BridgeLM(LM):
    """Answers and scores text by a bridge whose sources read it too.

    Args:
        bridge: a bridge with an aligned link, or `module:function` that returns one.
        batch_size: requests at once.

    Raises:
        ConfigError: the bridge has no aligned link, so that text would reach the target alone.
    """

    def __init__(self, bridge: Bridge | str, batch_size: int | str = 8) -> None:
        super().__init__()
        self.bridge = find_bridge(bridge)
        if all(link.geometry != "aligned" for link in self.bridge.config.links):
            raise ConfigError(
                "lm-evaluation-harness asks in text, and this bridge has no aligned link: its "
                "source would read nothing"
            )
        self.batch_size = check_batch_size(batch_size)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation after its context, and whether greedy.

        Where the target has a chat template, the continuation is the beginning of its answer and
        has no space before it.
        """
        scores: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch_size):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            scores += self._score([_split(*pair) for pair in batch])
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Refused: a bridge fuses a prompt that both models have read whole.

        Were the text that is scored fused, a token would be predicted from what the source has
        read after it.
        """
        raise UnsupportedError(
            "loglikelihood_rolling: a bridge answers a prompt, a text without one has nothing to "
            "fuse; choose tasks of loglikelihood, multiple_choice or generate_until"
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, cut off at the task's stops."""
        inputs = [SourceInput(text=request.args[0]) for request in requests]
        settings = [request.args[1] for request in requests]
        return generate(self.bridge, inputs, settings, self.batch_size)

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Each context is read once, however many continuations follow it."""
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        seen, caches = read(self.bridge, [SourceInput(text=text) for text in contexts])
        fused = self.bridge.fuse(seen, contexts, caches)
        rows = [contexts.index(context) for context, _ in pairs]
        answers = [self._answer_ids(text) for _, text in pairs]
        sums, is_greedy = self.bridge.target.score(fused, rows, answers)
        return list(zip(sums.tolist(), is_greedy.tolist(), strict=True))

    def _answer_ids(self, text: str) -> list[int]:
        tokenizer: Any = self.bridge.target.tokenizer
        if tokenizer.chat_template:
            text = text.lstrip()
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _split(context: str, continuation: str) -> tuple[str, str]:
    """The context as a bridge reads it, without space around it; what stood behind it moves on."""
    text = context.rstrip()
    if not text:
        raise UnsupportedError(
            f"a bridge answers a prompt, got none before {continuation!r}; leave out tasks or "
            "metrics that score a text by itself, such as acc_mutual_info"
        )
    return text.lstrip(), context[len(text) :] + continuation


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
