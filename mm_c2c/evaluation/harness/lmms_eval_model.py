"""A bridge that sees under lmms-eval, which finds it by its entry point.

python -m lmms_eval --model mm_c2c --model_args bridge=my_package:load_bridge --tasks gqa
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from mm_c2c.bridge import Bridge
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.evaluation.harness import check_batch_size, find_bridge, generate
from mm_c2c.sources.base import SourceInput

try:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(f"{error}; install it with: pip install 'mm-c2c[lmms-eval]'") from error


class BridgeLMM(lmms):
    """Answers questions about one picture each.

    Args:
        bridge: a bridge, or `module:function` that returns one.
        batch_size: requests at once.
    """

    def __init__(
        self,
        bridge: Bridge | str = "mm_c2c.reference.models:load_bridge",
        batch_size: int | str = 8,
    ) -> None:
        super().__init__()
        self.bridge = find_bridge(bridge)
        self.batch_size = check_batch_size(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, cut off at the task's stops.

        Raises:
            InputError: a question does not come with exactly one picture.
        """
        inputs, settings = [], []
        for request in requests:
            question, kwargs, doc_to_visual, doc_id, task, split = request.args
            picture = _picture(doc_to_visual(self.task_dict[task][split][doc_id]), task, doc_id)
            inputs.append(SourceInput(text=question, images=(picture,)))
            settings.append(kwargs)
        return generate(self.bridge, inputs, settings, self.batch_size)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused."""
        raise UnsupportedError("loglikelihood: choose tasks of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused."""
        raise UnsupportedError("generate_until_multi_round: choose tasks of generate_until")


def _picture(visuals: Sequence[Any], task: str, doc_id: int) -> Image.Image:
    if len(visuals) != 1 or not isinstance(visuals[0], Image.Image):
        kinds = ", ".join(type(item).__name__ for item in visuals) or "nothing"
        raise InputError(f"task {task}, item {doc_id}: a bridge takes one picture, got {kinds}")
    return visuals[0].convert("RGB")
