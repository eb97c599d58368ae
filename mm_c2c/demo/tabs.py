"""The layout of the tabs beside the comparison, in Gradio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from mm_c2c.demo.builder import SCRIPT, canvas_props, draw, first_question, read_scene
from mm_c2c.demo.compare import Look
from mm_c2c.demo.inside import HANDED, inside_html, look_inside, tamper, tampered_html
from mm_c2c.demo.own import load_pair
from mm_c2c.demo.pair import known, open_picture
from mm_c2c.demo.results import run_html, runs
from mm_c2c.demo.robot import Show, answers_html, ask_step, find_step, step_html
from mm_c2c.demo.shared import ONE_AT_A_TIME, Shared, look_at, shown_errors
from mm_c2c.evaluation.arms import Setting

_CANVAS = """
<div class="builder">
  <p class="hint">Drag a sticker onto the canvas, or press it. On the canvas: drag or arrow keys
  move, + and - scale, Delete removes.</p>
  <div><div class="canvas" role="group" aria-label="Canvas"></div><div class="tools"></div></div>
  <div class="palette" role="group" aria-label="Stickers"></div>
  <p class="status unseen" role="status"></p>
</div>
"""


def inside_tab(shared: Shared) -> None:
    """Maps, gates and ranks of an answer, and the answer with another cache."""
    gr.Markdown("Of the picture and the question in *Ask*.")
    start = gr.Button("Look inside the answer", variant="primary")
    found = gr.HTML()
    gr.Markdown("### Hand over something else, or close the gates")
    with gr.Row():
        handed = gr.Radio(
            [(label, key) for key, label in HANDED.items()], value="other", label="Hand over"
        )
        scenes = {scene.description: str(scene.path) for scene in known().scenes}
        other = gr.Dropdown(
            list(scenes.items()),
            value=list(scenes.values())[1],
            label="The other picture shows",
            scale=2,
        )
        gate = gr.Slider(0, 1, 1, step=0.05, label="Gates, as a share of what they were")
    again = gr.Button("Ask with that")
    changed = gr.HTML()

    def inside(
        picture: dict[str, Any] | None, question: str, look: Look | None, own: Setting | None
    ) -> tuple[str, Look]:
        with shown_errors():
            look = look_at(picture, look, own or shared.setting)
            return inside_html(look_inside(look, question), look.picture), look

    def alter(
        picture: dict[str, Any] | None,
        question: str,
        handed: str,
        other: str,
        gate: float,
        look: Look | None,
        own: Setting | None,
    ) -> tuple[str, Look]:
        with shown_errors():
            look = look_at(picture, look, own or shared.setting)
            # One of those offered, not any file of this machine.
            second = open_picture(other if other in scenes.values() else None)
            result = tamper(look, question, handed=handed, gate=float(gate), other=second)
            return tampered_html(result, look, handed, float(gate), second), look

    asked = [shared.picture, shared.question]
    start.click(
        inside,
        [*asked, shared.look, shared.own],
        [found, shared.look],
        preprocess=False,
        api_name="look_inside",
        api_description="What the fused answer drew on; returns HTML.",
        **ONE_AT_A_TIME,
    )
    gr.on(
        [again.click, gate.release],
        alter,
        [*asked, handed, other, gate, shared.look, shared.own],
        [changed, shared.look],
        preprocess=False,
        api_name="tamper",
        api_description="The answer with another cache or gates less open; returns HTML.",
        **ONE_AT_A_TIME,
    )


def builder_tab(shared: Shared) -> None:
    """A canvas, and a button that asks about it."""
    canvas = gr.HTML(
        "",
        html_template=_CANVAS,
        js_on_load=SCRIPT.read_text(encoding="utf-8"),
        label="scene",
        **canvas_props(),
    )
    take = gr.Button("Ask about this scene", variant="primary")

    def build(text: str | None) -> tuple[Any, str]:
        with shown_errors():
            scene = read_scene(text)
            return draw(scene), first_question(scene)

    take.click(
        build,
        canvas,
        [shared.picture, shared.question],
        api_name="build_scene",
        api_description="Draw a scene of stickers; returns the picture and a question to begin with.",
    ).success(lambda: gr.Tabs(selected="ask"), None, shared.tabs, api_visibility="private")


def robot_tab(show: Show | str) -> None:
    """Episodes played step by step, and questions about a step; or why there are none."""
    if isinstance(show, str):
        gr.Markdown(show)
        return
    gr.Markdown(
        "A policy that acts by itself, recorded. The text LLM never saw the scene: it is handed "
        "the policy's cache."
    )
    titles = list(show.episodes)
    first = find_step(show, titles[0], 1)[0]
    title = gr.Dropdown(titles, value=titles[0], label="Episode")
    number = gr.Slider(1, len(first.steps), 1, step=1, label="Step")
    with gr.Row():
        back, on = (gr.Button(text, size="sm", min_width=120) for text in ("Step back", "Step on"))
    seen = gr.HTML(step_html(show, titles[0], 1))
    question = gr.Dropdown(
        list(show.questions),
        value=show.questions[0],
        allow_custom_value=True,
        label="Question: choose one, or type your own",
    )
    ask = gr.Button("Ask about this step", variant="primary")
    answers = gr.HTML()

    def begin(title: str) -> Any:
        with shown_errors():
            return gr.Slider(1, len(find_step(show, title, 1)[0].steps), 1)

    def look(title: str, number: float) -> tuple[str, str]:
        with shown_errors():
            return step_html(show, title, number), ""

    def respond(title: str, number: float, question: str) -> tuple[str, dict[str, str]]:
        with shown_errors():
            found = ask_step(show, title, number, question)
            return answers_html(found), found

    title.change(begin, title, number, api_visibility="private").then(
        look, [title, number], [seen, answers], api_visibility="private", **ONE_AT_A_TIME
    )
    number.change(
        look,
        [title, number],
        [seen, answers],
        trigger_mode="always_last",
        show_progress="hidden",
        api_name="robot_step",
        api_description="A step of a recorded episode, from 1; returns HTML.",
        **ONE_AT_A_TIME,
    )
    for button, ahead in ((back, -1), (on, 1)):
        button.click(
            lambda title, number, ahead=ahead: find_step(show, title, number + ahead)[1].index + 1,
            [title, number],
            number,
            api_visibility="private",
        )
    ask.click(
        respond,
        [title, number, question],
        [answers, gr.JSON(visible=False, label="answers")],
        api_name="ask_robot",
        api_description="Ask about a step; returns HTML and, by arm, the answers.",
        **ONE_AT_A_TIME,
    )


def results_tab(tab: gr.Tab) -> None:
    """Tables and plots of the shipped evaluations, made when first looked at."""
    first = next(iter(runs()))
    choice = gr.Radio(list(runs()), value=first, label="Questions")
    shown = gr.HTML()
    for event in (tab.select, choice.change):
        event(run_html, choice, shown, api_visibility="private", show_progress="minimal")


def own_tab(shared: Shared) -> None:
    """Names of a visitor's own pair, and how far its loading is."""
    gr.Markdown(
        "A vision-language model, a text LLM, and the fuser that `Bridge.save_pretrained` wrote "
        "for them: Hub ids, or folders of this machine. Safetensors only, and no code of a "
        "model's own is run."
    )
    names = [gr.Textbox(label=label) for label in ("Source", "Target", "Bridge")]
    with gr.Row():
        load = gr.Button("Load", variant="primary")
        back = gr.Button("Back to the pair that ships")
    status = gr.Markdown("Asked is the pair that ships.")

    def bring(source: str, target: str, bridge: str) -> Iterator[tuple[str, Any]]:
        with shown_errors():
            for step in load_pair(source, target, bridge):
                yield step.text, step.setting or gr.skip()

    load.click(
        bring, names, [status, shared.own], api_visibility="private", **ONE_AT_A_TIME
    ).failure(
        lambda: "Not loaded; asked is the same pair as before.",
        None,
        status,
        api_visibility="private",
    )
    back.click(
        lambda: ("Asked is the pair that ships.", None),
        None,
        [status, shared.own],
        api_visibility="private",
    )
