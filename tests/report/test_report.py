import re
from datetime import date
from importlib.util import find_spec
from shutil import which

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from tiny import D_MODEL, make_model, make_sae, random_code, set_code

from yapo_cli import main
from yapo_peft import ConfigError, DatasetError, YaPOConfig
from yapo_peft.report import ReportContents, collect_report, render_report, write_report
from yapo_peft.report.contents import training_history
from yapo_peft.report.page import number, visible

HISTORY = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": "0.6", "eval_loss": 0.65}, {"step": 3, "train_runtime": 1.0}]
NASTY = "<script>document.title = 'broken'</script> & \"quotes\" " + "x" * 400


def steered(layers=(1, 2), space="sae"):
    saes = {"sae": [make_sae(seed=seed) for seed, _ in enumerate(layers)]} if space == "sae" else {}
    model = get_peft_model(make_model(), YaPOConfig(layers=list(layers), space=space, **saes))
    set_code(model, random_code(0.3) if space == "sae" else torch.ones(D_MODEL))
    return model


QUESTIONS = [{"question": "w1 w2", "options": ["w3", "w4"], "answer": 1}] * 3


@pytest.fixture
def contents(pairs, tokenizer):
    return collect_report(
        steered(), pairs, tokenizer, questions=QUESTIONS, history=HISTORY, multipliers=(-1, 0, 1), top=3, attributed=4,
        steps=2, prompts=2, max_new_tokens=4,
    )  # fmt: skip


@pytest.mark.feature("Reading", "`write_report`, `yapo report`: one HTML page about an adapter, without a network")
def test_page_shows_the_measured_values(contents):
    page = render_report(contents)
    assert len(page) < 3_000_000
    names = re.findall(r' id="([^"]+)"', page)
    assert len(set(names)) == len(names)
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(names)
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    text = re.sub(r"<[^>]+>", " ", page)
    for row in contents.features.itertuples():
        assert f"{row.value:+.3g}" in text
        assert all(visible(token) in text for token in row.promotes)
    assert f"{contents.attribution.effect:+.4g}" in text
    assert all(f"{value:.3g}" in text for value in contents.preference.summary()["margin"])
    assert "knowledge, %" in text
    assert "evaluation" in text
    assert [row["multiplier"] for row in contents.answers] == [-1.0, 0.0, 1.0] * 2
    listed = set(zip(contents.features["layer"], contents.features["feature"], strict=True))
    left_out = contents.attribution.features.dropna(subset="left_out")
    assert listed >= set(zip(left_out["layer"], left_out["feature"], strict=True))
    assert set(zip(contents.passages["layer"], contents.passages["feature"], strict=True)) <= listed


def test_dense_adapter_is_listed_as_vectors(pairs, tokenizer, tmp_path):
    contents = collect_report(
        steered(space="dense"), pairs, tokenizer, multipliers=(0, 1), attributed=2, steps=2, prompts=0
    )
    page = render_report(contents)
    assert page.count("<td>vector</td>") == 2
    assert "no questions were given" in page
    assert 'id="answers"' not in page
    assert 'id="training"' not in page


def test_zero_code_is_reported_to_have_no_effect(pairs, tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    page = render_report(collect_report(model, pairs, tokenizer, multipliers=(0, 1), prompts=0))
    assert "the adapter has no effect" in page
    assert 'id="attribution"' not in page


def test_failed_report_keeps_the_existing_file(pairs, tokenizer, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("before")
    with pytest.raises(ConfigError, match="multipliers="):
        write_report(steered(), file, pairs, tokenizer, multipliers=(1,))
    assert file.read_text() == "before"
    with pytest.raises(ConfigError, match=r"must end in '\.html'"):
        write_report(steered(), tmp_path / "report.pdf", pairs, tokenizer)
    for options, message in (
        ({"prompts": -1}, "prompts=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"multiplier": 0}, "multiplier=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_report(steered(), file, pairs, tokenizer, **options)
    with pytest.raises(DatasetError, match="texts is a str, not a list or a dataset"):
        write_report(steered(), file, pairs, tokenizer, text="w1 w2")
    with pytest.raises(DatasetError, match="A pair has no"):
        write_report(steered(), file, [{"prompt": "w1"}], tokenizer)


def test_training_history_is_read_from_the_last_checkpoint(tmp_path):
    assert training_history(tmp_path) == []
    for step in (5, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(f'{{"log_history": [{{"step": {step}}}]}}')
    assert training_history(tmp_path) == [{"step": 20}]
    assert training_history(tmp_path / "checkpoint-5") == [{"step": 5}]


@pytest.mark.feature("Reading", "Reports and tables of self-contained adapters, without the SAE")
def test_report_command_on_a_saved_adapter(pairs, saved_adapter, tmp_path, capsys):
    pairs.to_json(tmp_path / "pairs.jsonl")
    (tmp_path / "text.txt").write_text("w1 w2 w3\n\nw4 w5")
    out = tmp_path / "pages" / "report.html"
    arguments = [
        "report", str(saved_adapter), "--dataset", str(tmp_path / "pairs.jsonl"), "--out", str(out), "--limit", "4",
        "--text", str(tmp_path / "text.txt"), "--multipliers", "-1,1", "--attributed", "2", "--answers", "1",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert str(out) in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert "<h1>adapter</h1>" in page
    assert "of 4 pairs" in page
    assert "<dt>pairs</dt><dd>4 of pairs.jsonl</dd>" in page
    assert f"<dd>{date.today().isoformat()}</dd>" in page
    assert str(tmp_path) not in page
    assert "## Features" not in (saved_adapter / "README.md").read_text(encoding="utf-8")
    assert main([*arguments, "--card"]) == 0
    card = (saved_adapter / "README.md").read_text(encoding="utf-8")
    assert "## Features" in card
    assert "(dose-response.png)" in card
    assert (saved_adapter / "dose-response.png").stat().st_size > 1000
    rows = [
        line.split(" | ") for line in card.splitlines() if " | constant | " in line or " | input-dependent | " in line
    ]
    left_out = [float(row[3]) for row in rows if row[3]]
    assert len(left_out) == 2
    assert [abs(value) for value in left_out] == sorted(map(abs, left_out), reverse=True)
    (saved_adapter / "README.md").unlink()
    for bad, message in (
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--dataset", "nowhere.csv"], "The file 'nowhere.csv' does not exist"),
        (["--out", str(tmp_path)], "must end in '.html'"),
        (["--card"], "There is no"),
        (["--dtype", "foo"], "--dtype 'foo': must be 'auto'"),
    ):
        assert main([*arguments, *bad]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("value", "formatted"), [(100.0, "100"), (0.1234, "0.123"), (float("nan"), ""), (None, "")])
def test_number_formatting(value, formatted):
    assert number(value) == formatted


@pytest.fixture
def browser():
    if find_spec("playwright") is None or which("chromium") is None:
        pytest.skip("no playwright, or no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(browser, contents, tmp_path, scheme):
    rows = [{**row, "prompt": NASTY, "answer": NASTY} for row in contents.answers]
    features = contents.features.assign(label=NASTY, promotes=[[NASTY]] * len(contents.features))
    changed = {**vars(contents), "title": NASTY, "answers": rows, "features": features}
    file = tmp_path / "report.html"
    file.write_text(render_report(ReportContents(**changed)), encoding="utf-8")
    page = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 800}).new_page()
    messages, requested = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(file.as_uri())
    assert page.title() == NASTY.strip()
    assert requested == [file.as_uri()]
    assert not messages
    # Only elements with their own scroll bar may be wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)")
    assert len(sizes) == 7
    assert min(sizes) > 250
    ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text, figure svg g')).color")
    assert ink == page.evaluate("getComputedStyle(document.body).color")
    assert (ink == "rgb(230, 233, 236)") == (scheme == "dark")

    def column(table, index):
        rows = page.locator("table.sortable").nth(table).locator("tbody tr")
        return [cell.strip() for cell in rows.locator(f"td:nth-child({index + 1})").all_inner_texts()]

    heads = page.locator("table.sortable").nth(1).locator("th button")
    heads.nth(2).focus()
    page.keyboard.press("Enter")
    values = [float(cell) for cell in column(1, 2)]
    assert values == sorted(values)
    page.keyboard.press("Enter")
    assert [float(cell) for cell in column(1, 2)] == sorted(values, reverse=True)
    assert page.locator("table.sortable").nth(1).locator("th").nth(2).get_attribute("aria-sort") == "descending"
    heads.nth(6).click()
    left_out = column(1, 6)
    known = [float(cell) for cell in left_out if cell]
    assert known == sorted(known)
    assert left_out[len(known) :] == [""] * (len(left_out) - len(known))
    if page.locator("details").count():
        page.locator("summary").first.click()
        assert page.locator(".passage").first.is_visible()


def test_page_escapes_html(contents):
    features = contents.features.assign(label=NASTY, link=NASTY)
    passages = pd.DataFrame(
        [{"layer": 1, "feature": features["feature"][0], "peak": 1.0, "tokens": [NASTY], "values": [np.inf]}]
    )
    page = render_report(ReportContents(**{**vars(contents), "features": features, "passages": passages}))
    assert "<script>document" not in page
