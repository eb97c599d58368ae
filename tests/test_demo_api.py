"""The page's functions as `gradio_client` calls them, on a page served to this machine."""

import gc
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from mm_c2c import Bridge
from mm_c2c.demo.page import build_page
from mm_c2c.demo.pair import known
from mm_c2c.demo.serve import Exposure, launch
from mm_c2c.demo.shared import open_shown
from mm_c2c.errors import InputError
from mm_c2c.evaluation.arms import Setting
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.reference.scenes import CAPTION_REQUEST

# Gradio leaves its event loops and sockets to the garbage collector, which complains of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
    ),
]
SCENE = '{"stickers": [{"name": "cat", "x": 0.2, "y": 0.2, "size": 0.3}]}'


@pytest.fixture
def client(bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    page = build_page(Setting(bridge=bridge, source_name=SOURCE_NAME, request=CAPTION_REQUEST))
    url = launch(page, Exposure(), wait=False)
    caller = Client(url, verbose=False, download_files=str(tmp_path / "got"))
    yield caller
    caller.close()
    page.close(verbose=False)
    del caller, page
    gc.collect()


def test_the_api_answers_as_documented(client: Client, tmp_path: Path) -> None:
    first, second = (handle_file(str(scene.path)) for scene in known().scenes[:2])
    html, numbers = client.predict(first, "where is it ?", api_name="/ask")
    assert "perceived <b>once</b>" in html
    assert list(numbers) == ["fused", "caption_relay", "blind", "source"]
    assert numbers["fused"]["cache_positions"] == 4
    assert numbers["fused"]["ttft_ms"] > 0
    again, _ = client.predict(first, "what is it ?", api_name="/ask")
    assert "perceived <b>once</b>" in again
    other = str(known().scenes[1].path)
    changed = client.predict(first, "what is it ?", "other", other, 1, api_name="/tamper")
    assert "another picture&#x27;s cache" in changed or "another picture's cache" in changed
    path, question = client.predict(SCENE, api_name="/build_scene")
    assert question.endswith("?")
    assert Image.open(path["path"] if isinstance(path, dict) else path).size == (288, 288)

    junk = tmp_path / "junk.png"
    junk.write_bytes(b"no picture")
    for picture, asked, said in (
        (handle_file(str(junk)), "what is it ?", "junk.png is not a picture"),
        (None, "what is it ?", "There is no picture"),
        (second, " ", "The question is empty"),
        (second, None, "The question is empty"),
    ):
        with pytest.raises(AppError, match=said):
            client.predict(picture, asked, api_name="/ask")
    # No file of this machine but the scenes that are offered.
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    with pytest.raises(AppError, match="There is no picture"):
        client.predict(first, "what is it ?", "other", str(secret), 1, api_name="/tamper")
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    assert names == {"/ask", "/look_inside", "/tamper", "/build_scene"}


def post(client: Client, name: str, *data: Any) -> str:
    """What the page answers a request that no client of Gradio's has put in order."""
    address = f"{client.src}gradio_api/call/{name}"
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}") as answer:
        return answer.read().decode()


def test_a_request_by_hand_reads_no_file_of_this_machine(client: Client, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    around = tmp_path / "gradio" / ".." / "secret.png"
    for path in (tmp_path / "secret.png", around, tmp_path / "missing.png"):
        for name in ("ask", "look_inside"):
            said = post(client, name, {"path": str(path)}, "what is it ?")
            assert "There is no picture: pick a scene" in said
    scene = {"path": str(known().scenes[0].path)}
    assert "perceived" in post(client, "ask", scene, "what is it ?")


def test_an_upload_is_kept_while_it_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    path = tmp_path / "mine.png"
    Image.new("RGB", (8, 8)).save(path)
    os.utime(path, (0, 0))
    assert open_shown({"path": str(path)}).size == (8, 8)
    assert time.time() - path.stat().st_mtime < 60
    path.unlink()
    with pytest.raises(InputError, match="deleted after some ten minutes: upload it again"):
        open_shown({"path": str(path)})
