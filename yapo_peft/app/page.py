"""The page of the playground, on Gradio."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Hashable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, YaPOError
from ..report.marking import marked_tokens
from .playground import Dials, Playground

if TYPE_CHECKING:
    import pandas as pd
    from gradio import Blocks

# Gradio sends usage statistics otherwise.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

# Answers that wait for the model at a time, and requests that wait for them.
_WAITING, _QUEUED = 4, 32

_HEAD = ["adapter", "layer", "feature", "value", "activation", "promotes", "label"]
_TYPES: list[Any] = ["str", "number", "number", "number", "str", "str", "str"]
_STATIC = [column for column, name in enumerate(_HEAD) if name != "value"]
_PROMPT = "Tell me about your day."


def build_page(playground: Playground, strongest: float = 4.0) -> Blocks:
    """Builds the page; `serve_page` serves it on this machine only.

    Settings are per user: each request carries the dials that steer its answer.

    Args:
        playground: The model and its adapters.
        strongest: The ends of the multiplier sliders.

    Raises:
        ImportError: Gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("The app needs Gradio: pip install 'yapo-peft[app]'.") from error

    @contextmanager
    def shown(*errors: type[Exception]) -> Generator[None]:
        """Shows errors on the page."""
        try:
            yield
        except (YaPOError, *errors) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def load(source: str, chosen: list[str]) -> tuple[Any, str]:
        with shown(ValueError, OSError):
            name = playground.load(source)
        return gr.update(choices=playground.adapters, value=[*chosen, name]), ""

    def table(chosen: list[str]) -> tuple[list[list[Any]], Any]:
        return listed([row for name in chosen for row in _rows(playground, name, playground.features(name))])

    def listed(rows: list[list[Any]]) -> tuple[list[list[Any]], Any]:
        names = [f"{adapter}: layer {layer}, feature {feature}" for adapter, layer, feature, *_ in rows]
        return rows, gr.update(choices=names, value=names[0] if names else None)

    def answer(
        prompt: str,
        chosen: list[str],
        multipliers: dict[str, float],
        rows: list[list[Any]],
        length: float,
        temperature: float,
        seed: float,
    ) -> Generator[tuple[str, str]]:
        with shown():
            dials = _dials(playground, chosen, multipliers, rows)
            yield from playground.answers(prompt, dials, int(length), temperature, int(seed))

    def highlight(text: str, feature: str | None) -> str:
        if not text or not feature:
            return "<p>Generate an answer and choose a feature first.</p>"
        adapter, _, place = feature.rpartition(": layer ")
        layer, _, index = place.partition(", feature ")
        with shown():
            tokens, values = playground.activity(text, adapter, (int(layer), int(index)))
        if not any(value > 0 for value in values):
            return "<p>The feature is off at all of these tokens.</p>"
        return f'<p style="white-space: pre-wrap">{marked_tokens(tokens, values)}</p>'

    def save(adapter: str, name: str, chosen: list[str], multipliers: dict[str, float], rows: list[list[Any]]) -> str:
        with shown():
            return f"Saved to {playground.save(adapter, _dials(playground, chosen, multipliers, rows), name.strip())}."

    def find(adapter: str | None, query: str, by: str, rows: list[list[Any]]) -> tuple[list[list[Any]], Any]:
        with shown():
            if not adapter:
                raise ConfigError("Choose an adapter whose SAE to search.")
            known = {tuple(row[:3]) for row in rows}
            found = _rows(playground, adapter, playground.find(adapter, query, by))
            return listed(rows + [row for row in found if tuple(row[:3]) not in known])

    first = playground.adapters[:1]
    with gr.Blocks(title="yapo", analytics_enabled=False) as page:
        multipliers = gr.State(dict.fromkeys(first, 1.0))
        gr.Markdown("# Steering playground")
        with gr.Row():
            chosen = gr.Dropdown(
                playground.adapters, value=first, multiselect=True, label="Adapters", elem_id="adapters"
            )
            source = gr.Textbox(label="Load an adapter (folder or Hub repository)", elem_id="source")
            loading = gr.Button("Load", elem_id="load")

        @gr.render(inputs=[chosen, multipliers], triggers=[page.load, chosen.change])
        def sliders(names: list[str], set_to: dict[str, float]) -> None:
            for name in names:
                slider = gr.Slider(
                    -strongest,
                    strongest,
                    value=set_to.get(name, 1.0),
                    step=0.1,
                    interactive=True,
                    label=f"Multiplier of {name}",
                    elem_id=f"multiplier-{name}",
                )
                slider.change(
                    lambda value, known, name=name: {**known, name: value},
                    [slider, multipliers],
                    multipliers,
                    queue=False,
                )

        prompt = gr.Textbox(_PROMPT, label="Prompt", lines=3, elem_id="prompt")
        with gr.Row():
            longest = playground.max_new_tokens
            length = gr.Slider(1, longest, value=min(80, longest), step=1, label="Maximum new tokens")
            temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0 is greedy)")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        with gr.Row():
            asking = gr.Button("Generate", variant="primary", elem_id="answer")
            stopping = gr.Button("Stop", elem_id="stop")
        with gr.Row():
            unsteered = gr.Textbox(label="Unsteered", lines=8, interactive=False, elem_id="unsteered")
            steered = gr.Textbox(label="Steered", lines=8, interactive=False, elem_id="steered")
        with gr.Accordion("Features: change their values, or empty them", open=False, elem_id="features"):
            features = gr.Dataframe(
                headers=_HEAD, datatype=_TYPES, type="array", interactive=True, static_columns=_STATIC, wrap=True,
                column_count=len(_HEAD), elem_id="values",
            )  # fmt: skip
            with gr.Row():
                searched = gr.Dropdown(playground.adapters, value=(first or [None])[0], label="Adapter")
                by = gr.Radio(["text", "label", "number"], value="text", label="Find features by", elem_id="by")
                query = gr.Textbox(label="A text where they are active, words of a label, or a number", elem_id="query")
                finding = gr.Button("Find", elem_id="find")
        with gr.Accordion("Activations of a feature on the steered answer", open=False, elem_id="activity"):
            feature = gr.Dropdown([], label="Feature", elem_id="feature")
            marking = gr.Button("Show", elem_id="show")
            marked = gr.HTML(elem_id="marked")
        with gr.Accordion("Save an adapter with these settings", open=False, elem_id="saving"):
            with gr.Row():
                which = gr.Dropdown(playground.adapters, value=(first or [None])[0], label="Adapter")
                name = gr.Textbox(label="New adapter's name", elem_id="name")
                saving = gr.Button("Save", elem_id="save")
            where = gr.Markdown(elem_id="saved")

        loading.click(load, [source, chosen], [chosen, source]).then(
            lambda: [gr.update(choices=playground.adapters)] * 2, None, [which, searched]
        )
        finding.click(find, [searched, query, by, features], [features, feature])
        gr.on([page.load, chosen.change], table, chosen, [features, feature])
        inputs = [prompt, chosen, multipliers, features, length, temperature, seed]
        # The model answers one at a time; those that wait hold a thread each.
        running = asking.click(answer, inputs, [unsteered, steered], concurrency_limit=_WAITING)
        stopping.click(None, cancels=[running])
        marking.click(highlight, [steered, feature], marked)
        saving.click(save, [which, name, chosen, multipliers, features], where)
    page.queue(max_size=_QUEUED)
    return page


def serve_page(page: Blocks, port: int | None = None) -> str:
    """Serves a page on this machine only, in the background, and returns its address.

    Requests by another host's name are refused: a page on the Internet could give its own name this machine's address,
    and speak for the user of the browser (DNS rebinding).

    Args:
        page: The page.
        port: The port to listen on; None for a free one.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [hosts]},
    )
    return address


def _rows(playground: Playground, adapter: str, table: pd.DataFrame) -> list[list[Any]]:
    """The page's rows of features that `explain` or `find_features` lists."""
    listed = table.dropna(subset="feature").to_dict("records")
    places = [(adapter, int(row["layer"]), int(row["feature"])) for row in listed]
    values = playground.values(places)
    return [
        [*place, _shown(values[place]), _activation(row), " ".join(row["promotes"]), row["label"] or ""]
        for place, row in zip(places, listed, strict=True)
    ]


def _activation(row: Mapping[Hashable, Any]) -> str:
    """Where a feature that was found by a text is active."""
    return "" if row.get("token") is None else f"{row['activation']:.3g} at {row['token']!r}"


def _shown(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _dials(playground: Playground, chosen: list[str], multipliers: dict[str, float], rows: list[list[Any]]) -> Dials:
    """The settings of a user's page; no value is for no steering, and one that is not a finite number is ignored."""
    places = [(str(adapter), int(layer), int(feature)) for adapter, layer, feature, *_ in rows]
    before, values = playground.values(places), dict[tuple[str, int, int], float | None]()
    for place, (_, _, _, value, *_) in zip(places, rows, strict=True):
        try:
            number = None if value is None or value == "" else float(value)
        except (TypeError, ValueError):
            continue
        # Values are shown rounded; those that were not changed stay as they are.
        if number != _shown(before[place]) and (number is None or math.isfinite(number)):
            values[place] = number
    return Dials({name: float(multipliers.get(name, 1.0)) for name in chosen}, values)
