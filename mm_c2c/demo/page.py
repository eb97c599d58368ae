"""The layout of the page, in Gradio; what it does stands in the other files of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from mm_c2c.bridge import Bridge
from mm_c2c.demo.compare import Look, columns_html, compare
from mm_c2c.demo.pair import GENERIC, ITEMS, digest, known, open_picture, suggestions
from mm_c2c.errors import MMC2CError
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.reference.scenes import CAPTION_REQUEST

QUEUE_LENGTH = 20
KEPT_S = 600
CSS = """
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.75rem}
.card{border:1px solid var(--border-color-primary);border-radius:.5rem;padding:.75rem}
.card.fused{border:2px solid var(--color-accent)}
.card h3{margin:0;font-size:1rem}.card .what{margin:.2rem 0;font-size:.8rem;opacity:.8}
.card .answer{font-size:1.3rem;font-weight:600;margin:.5rem 0;overflow-wrap:anywhere}
.card .caption{font-size:.85rem;font-style:italic;margin:.3rem 0}
.card dl{display:grid;grid-template-columns:1fr auto;gap:.1rem .5rem;font-size:.8rem;margin:0}
.card dd{margin:0;text-align:right}.seen{margin:.3rem 0 .6rem}
footer{display:none!important}
"""


def build_page(bridge: Bridge, *, notice: str = "") -> gr.Blocks:
    """The whole page.

    Args:
        bridge: both frozen models and the fuser.
        notice: what a visitor must know first, as Markdown.
    """
    with gr.Blocks(title="mm_c2c", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as page:
        gr.Markdown(
            "# A text LLM answers about a picture it never saw\n"
            "A small vision model looks at the picture once. Its **KV cache, not its words**, "
            "goes through a trained fuser into a frozen text LLM, which answers.\n\n" + notice
        )
        with gr.Tab("Compare"):
            _compare_tab(bridge)
    return page


def launch(page: gr.Blocks, *, port: int | None = None, open_browser: bool = False) -> None:
    """Serve the page on this machine alone, until it is stopped."""
    page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1).launch(
        **launch_settings(), server_port=port, inbrowser=open_browser
    )


def launch_settings() -> dict[str, Any]:
    """How the page is served: nothing is shared or fetched from elsewhere, fonts included."""
    fonts = ["system-ui", "sans-serif"]
    return {
        "share": False,
        "css": CSS,
        "theme": gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        "allowed_paths": [str(ITEMS.parent)],
        "max_file_size": "20mb",
        "show_error": False,
    }


def _compare_tab(bridge: Bridge) -> None:
    looks = gr.State(None, time_to_live=KEPT_S)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = picture_input()
        with gr.Column(scale=2, min_width=280):
            question = gr.Textbox(
                label="Question", placeholder="What is on the left?", max_length=300
            )
            with gr.Row():
                ask = gr.Button("Ask", variant="primary")
                stop = gr.Button("Stop")
            gr.Markdown("Or press one:")
            with gr.Row():
                buttons = [gr.Button(text, size="sm", min_width=150) for text in GENERIC]
    gr.Examples(
        [[str(path), text] for path, text in known().scenes], [picture, question], label="Scenes"
    )
    answers = gr.HTML()

    def respond(
        path: str | None, text: str, looks: dict[str, Look] | None
    ) -> Iterator[tuple[str, dict[str, Look]]]:
        try:
            seen = open_picture(path)
            key = digest(seen)
            look = (looks or {}).get(key) or Look(
                bridge.sources[SOURCE_NAME], seen, CAPTION_REQUEST
            )
            options = known().options.get(text.strip(), ())
            for columns in compare(bridge, SOURCE_NAME, look, text, options):
                yield columns_html(columns, look), {key: look}
        except MMC2CError as error:
            raise gr.Error(str(error), print_exception=False) from error

    inputs, outputs = [picture, question, looks], [answers, looks]
    events = [
        gr.on([ask.click, question.submit], respond, inputs, outputs, api_name="ask"),
        *(
            button.click(lambda text: text, button, question, api_visibility="private").then(
                respond, inputs, outputs, api_visibility="private"
            )
            for button in buttons
        ),
    ]
    stop.click(None, cancels=events)
    picture.change(_suggest, picture, buttons, api_visibility="private", queue=False)


def picture_input() -> gr.Image:
    """Where a visitor hands in a picture; it is read, and refused, by `open_picture` alone."""
    picture = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "webcam", "clipboard"],
        label="Picture",
        height=300,
    )
    picture.preprocess = (  # type: ignore[method-assign]
        lambda payload: payload.path if payload else None
    )
    return picture


def _suggest(path: str | None) -> list[Any]:
    try:
        shown = suggestions(open_picture(path))
    except MMC2CError:
        shown = list(GENERIC)  # what is wrong is said when it is asked about
    return [gr.Button(text) for text in shown]
