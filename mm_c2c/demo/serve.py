"""How the page is served: to this machine alone, or wider with a login and limits."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import gradio as gr

from mm_c2c.demo.compare import Look, compare
from mm_c2c.demo.page import CSS
from mm_c2c.demo.pair import ITEMS, known, open_picture
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import Setting

QUEUE_LENGTH = 20
MAX_FILE = "20mb"
AUTH_VARIABLE = "MM_C2C_DEMO_AUTH"
# Gradio's toasts are a button around a button, which a screen reader cannot tell apart.
_HEAD = """<script>
new MutationObserver(() => {
  for (const toast of document.querySelectorAll(".toast-header[role=button]"))
    for (const name of ["role", "tabindex"]) toast.removeAttribute(name);
}).observe(document.documentElement, { childList: true, subtree: true });
</script>"""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Who can reach the page.

    Attributes:
        host: address to listen on.
        port: from 1 to 65535; the first free one from 7860 when None.
        share: through a public link of Gradio's.
        auth: `user:password` that visitors must log in with; None asks for none.
        in_space: whether this is a Hugging Face Space, whose owner has chosen who may visit.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    auth: str | None = None
    in_space: bool = False

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65_535:
            raise ConfigError(f"--port must be from 1 to 65535, got {self.port}")
        if self.auth is not None and not all(self.auth.partition(":")):
            raise ConfigError("a login is given as user:password, both of a character or more")
        if not (self.is_private or self.auth or self.in_space):
            raise ConfigError(
                "the page would be open to others: give --auth user:password, or set "
                f"{AUTH_VARIABLE} to such a pair, or leave --share and --host away"
            )

    @classmethod
    def from_environment(
        cls, *, host: str | None, port: int | None, share: bool, auth: str | None
    ) -> Exposure:
        """What the command line says, and where it is silent the environment."""
        in_space = "SPACE_ID" in os.environ
        return cls(
            host=host or ("0.0.0.0" if in_space else "127.0.0.1"),
            port=port,
            share=share,
            auth=auth or os.environ.get(AUTH_VARIABLE),
            in_space=in_space,
        )

    @property
    def is_private(self) -> bool:
        """Whether only this machine reaches the page."""
        return self.host in _LOOPBACK and not self.share


def check_port(exposure: Exposure) -> None:
    """Refuse an address that the page could not be served at, before models are loaded for it."""
    if exposure.port is None:
        return
    family = socket.AF_INET6 if ":" in exposure.host else socket.AF_INET
    try:
        socket.create_server((exposure.host, exposure.port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"the page cannot be served at port {exposure.port} of {exposure.host}: "
            f"{error.strerror}; choose another --port, or none for the first free one"
        ) from error


def warm_up(setting: Setting) -> None:
    """Let every arm answer once, so that the first visitor's times are fair."""
    scene = known().scenes[0]
    look = Look(setting, open_picture(str(scene.path)))
    for _ in compare(look, scene.question, known().options[scene.question]):
        pass


def launch(page: gr.Blocks, exposure: Exposure, *, wait: bool = True) -> str:
    """Serve the page.

    Args:
        page: from `build_page`.
        exposure: to whom.
        wait: until it is stopped; else return as soon as it is served.

    Returns:
        Its address.
    """
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="indigo", font=fonts, font_mono=["ui-monospace", "monospace"]
    ).set(
        # White on the theme's own tone is too faint to read.
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        color_accent="*primary_600",
    )
    user, _, password = (exposure.auth or "").partition(":")
    _, url, _ = page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1).launch(
        server_name=exposure.host,
        server_port=exposure.port,
        share=exposure.share,
        auth=(user, password) if user else None,
        css_paths=CSS,
        head=_HEAD,
        # Nothing is fetched from elsewhere, fonts included.
        theme=theme,
        allowed_paths=[str(ITEMS.parent)],
        max_file_size=MAX_FILE,
        show_error=False,
        prevent_thread_lock=not wait,
        quiet=not wait,
    )
    return url
