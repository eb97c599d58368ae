"""The layout of the page, in Gradio; what it does stands in the other files of this folder."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mm_c2c.demo.compare import Look, check_question, columns_html, compare, facts
from mm_c2c.demo.pair import GENERIC, known, open_picture, picture_html, suggestions
from mm_c2c.demo.robot import Show
from mm_c2c.demo.shared import ONE_AT_A_TIME, Shared, look_at, open_shown, shown_errors
from mm_c2c.demo.tabs import builder_tab, inside_tab, own_tab, results_tab, robot_tab
from mm_c2c.errors import MMC2CError
from mm_c2c.evaluation.arms import Setting

CSS = Path(__file__).with_name("page.css")
PICK = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { index: Number(button.dataset.index) });
});
"""
KEPT_S = 600


def build_page(
    setting: Setting,
    *,
    notice: str = "",
    own_pair: bool = False,
    show: Show | str = "No robot is shown on this page.",
) -> gr.Blocks:
    """The whole page.

    Args:
        setting: the pair that is asked.
        notice: what a visitor must know first, as Markdown.
        own_pair: let visitors load models of their own: for a page that only its owner visits.
        show: of the Robot tab, from `load_show`.
    """
    first = known().scenes[0]
    with gr.Blocks(title="mm_c2c", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as page:
        gr.Markdown(
            "# A text LLM answers about a picture it never saw\n"
            "A small vision model looks at the picture once. Its **KV cache, not its words**, "
            "goes through a trained fuser into a frozen text LLM, which answers.\n\n" + notice
        )
        shared = Shared(
            setting,
            gr.Image(
                str(first.path),
                type="filepath",
                image_mode=None,
                sources=["upload", "webcam", "clipboard"],
                label="Picture",
                height=300,
                render=False,
            ),
            gr.Textbox(first.question, label="Question", max_length=300, render=False),
            gr.State(None, time_to_live=KEPT_S),
            gr.State(None),
            gr.Tabs(render=False),
        )
        shared.tabs.render()
        with shared.tabs:
            with gr.Tab("Ask", id="ask"):
                _ask_tab(shared)
            with gr.Tab("Look inside", id="inside"):
                inside_tab(shared)
            with gr.Tab("Build a scene", id="build"):
                builder_tab(shared)
            with gr.Tab("Robot", id="robot"):
                robot_tab(show)
            with gr.Tab("Results", id="results") as tab:
                results_tab(tab)
            if own_pair:
                with gr.Tab("Your own pair", id="own"):
                    own_tab(shared)
    return page


def _ask_tab(shared: Shared) -> None:
    picture, question = shared.picture, shared.question
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture.render()
        with gr.Column(scale=2, min_width=280):
            question.render()
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", scale=3, min_width=160)
                stop = gr.Button("Stop", scale=1, min_width=80)
            gr.Markdown("Or press one:")
            with gr.Row(elem_classes="suggested"):
                shown = suggestions(open_picture(str(known().scenes[0].path)))
                buttons = [gr.Button(text, size="sm", min_width=180) for text in shown]
            scenes = gr.HTML(scenes_html(), js_on_load=PICK)
    answers, numbers = gr.HTML(), gr.JSON(visible=False, label="numbers")

    def respond(
        picture: dict[str, Any] | None,
        question: str | None,
        look: Look | None,
        own: Setting | None,
    ) -> Iterator[tuple[str, dict[str, Any], Look]]:
        with shown_errors():
            look = look_at(picture, look, own or shared.setting)
            question = check_question(question)
            options = known().options.get(question, ())
            for columns in compare(look, question, options):
                yield columns_html(columns, look), facts(columns), look

    asking: dict[str, Any] = {
        "fn": respond,
        "inputs": [picture, question, shared.look, shared.own],
        "outputs": [answers, numbers, shared.look],
        "preprocess": False,
        "scroll_to_output": True,
        **ONE_AT_A_TIME,
    }
    events = [
        gr.on(
            [ask.click, question.submit],
            **asking,
            api_name="ask",
            api_description="Ask all arms about a picture; returns HTML and, by arm, the numbers.",
        ),
        *(
            button.click(lambda text: text, button, question, api_visibility="private").then(
                **asking, api_visibility="private"
            )
            for button in buttons
        ),
    ]
    stop.click(None, cancels=events)
    scenes.select(_pick, None, picture, api_visibility="private", queue=False)
    picture.change(
        _suggest,
        picture,
        [answers, *buttons],
        preprocess=False,
        api_visibility="private",
        queue=False,
    )


def scenes_html() -> str:
    """The bundled scenes as buttons, told apart also by what they show."""
    buttons = "".join(
        f'<button type="button" data-index="{index}" aria-label="{html.escape(scene.description)}">'
        f"{picture_html(open_picture(str(scene.path)), '', pixels=96)}</button>"
        for index, scene in enumerate(known().scenes)
    )
    return f'<div class="scenes" role="group" aria-label="Other pictures">{buttons}</div>'


def _pick(event: gr.EventData) -> str:
    return str(known().scenes[int(event.index)].path)


def _suggest(picture: dict[str, Any] | None) -> list[Any]:
    """No answers, which were of another picture, and the buttons' questions."""
    try:
        shown = suggestions(open_shown(picture))
    except MMC2CError:
        shown = list(GENERIC)  # what is wrong is said when it is asked about
    return ["", *(gr.Button(text) for text in shown)]
