"""The Hub: loading frozen models, sending a saved bridge there, and fetching one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError

from mm_c2c.errors import ConfigError, FetchError, UnsupportedError
from mm_c2c.pretrained import CONFIG_NAME, WEIGHTS_NAME

CARD_NAME = "README.md"


def load_pretrained(
    kind: str, name: str, revision: str | None, dtype: torch.dtype | None = None
) -> Any:
    """What a class of transformers makes of a folder or a repository.

    Weights are read from safetensors only; code that comes with a model is not run.

    Args:
        kind: name of the class.
        name: Hub id or folder.
        revision: the Hub's commit.
        dtype: of a model's weights; None for what has none.

    Raises:
        FetchError: it could not be had, or not be read.
        UnsupportedError: transformers has no such class.
    """
    found = getattr(transformers, kind, None)
    if found is None:
        raise UnsupportedError(f"{name!r} says that it is a {kind}, which transformers has not")
    weights = {} if dtype is None else {"dtype": dtype, "use_safetensors": True}
    try:
        return found.from_pretrained(name, revision=revision, **weights)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        said = str(error).strip().partition("\n")[0]
        advice = "; if its files are damaged, fetch them again" if Path(name).exists() else ""
        raise FetchError(f"{name!r} could not be loaded as {kind}: {said}{advice}") from error


def pin_revision(name: str, revision: str | None) -> str | None:
    """The commit that a branch, a tag or a repository's newest state is now.

    Args:
        name: Hub id; a folder has no commits, and keeps what it is given.
        revision: branch, tag or commit; None is the newest.

    Raises:
        FetchError: the repository could not be had.
    """
    if Path(name).exists():
        return revision
    try:
        config = hf_hub_download(name, CONFIG_NAME, revision=revision)
    except (OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise FetchError(
            f"{name!r} could not be loaded: it is no folder here, and the Hub did not give it: {said}"
        ) from error
    return Path(config).parent.name  # of the cache: snapshots/COMMIT


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload fuser",
) -> str:
    """Send a saved bridge and its card to the Hub; the repository is made if it is not there.

    Returns:
        The commit's address.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        allow_patterns=[CARD_NAME, CONFIG_NAME, WEIGHTS_NAME],
    )
    return commit.commit_url


def fetch_folder(folder: str | Path, revision: str | None = None) -> Path:
    """A folder as it is; a repository of the Hub, `user/name`, downloaded or from the cache.

    Args:
        folder: a folder is taken before a repository of the same name.
        revision: branch, tag or commit of the repository; None takes its newest.

    Raises:
        ConfigError: a revision of a folder, which has none.
        FetchError: there is no such folder, and the repository could not be had.
    """
    if isinstance(folder, Path) or Path(folder).is_dir() or not is_repo_id(folder):
        if revision is not None:
            raise ConfigError(
                f"{folder} is a folder, which has no revisions; leave revision={revision!r} out"
            )
        return Path(folder)
    try:
        found = snapshot_download(
            folder, revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]
        )
    except OSError as error:
        raise FetchError(
            f"{folder!r} is no folder here, and no repository that could be had from the Hub: {error}"
        ) from error
    return Path(found)


def is_repo_id(name: str) -> bool:
    """Whether a name has the form `user/name` of the Hub, and is no file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()
