"""The playground in a real browser."""

import re
from importlib.util import find_spec
from shutil import which

import pytest
import torch
from peft import get_peft_model
from tiny import make_model, make_sae, random_code, set_code

from yapo_peft import YaPOConfig
from yapo_peft.app import Dials, Playground, build_page, serve_page
from yapo_peft.tuner.adapters import steered_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.skipif(
        find_spec("playwright") is None or which("chromium") is None, reason="no playwright, or no chromium"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PROMPT = "w1 w2 w3"


@pytest.fixture
def playground(tokenizer, tmp_path):
    model = get_peft_model(make_model(), YaPOConfig(layers=1, sae=make_sae()), "one")
    model.add_adapter("two", YaPOConfig(layers=2, space="dense"))
    set_code(model, random_code(0.4), "one")
    set_code(model, 20 * random_code(1.0, seed=3), "two")
    return Playground(model.eval(), tokenizer, tmp_path / "saved")


@pytest.fixture
def address(playground):
    page = build_page(playground)
    yield serve_page(page)
    page.close()


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        yield started
        started.close()


def open_page(browser, address):
    """A new user's page, fully loaded."""
    page = browser.new_context().new_page()
    page.set_default_timeout(20_000)
    page.goto(address)
    page.locator("#multiplier-one input[type=number]").wait_for()
    page.locator("#prompt textarea").fill(PROMPT)
    return page


def set_slider(page, name, value):
    box = page.locator(f"#multiplier-{name} input[type=number]")
    with page.expect_response("**/gradio_api/run/**"):
        box.fill(str(value))
        box.press("Enter")


def dial(page, value):
    """Sets the value of the first feature listed, and returns the feature."""
    page.get_by_test_id("cell-0-2").get_by_text(re.compile(r"^\d+$")).wait_for()
    page.get_by_test_id("cell-0-3").dblclick()
    page.keyboard.press("Control+A")
    page.keyboard.type(str(value))
    page.keyboard.press("Enter")
    page.get_by_test_id("cell-0-3").get_by_text(str(value), exact=True).wait_for()
    page.wait_for_timeout(500)
    return int(page.get_by_test_id("cell-0-2").inner_text())


def ask(page, answers):
    """Asks for answers, and waits until these are shown; earlier ones, and parts of them, may be there before."""
    page.locator("#answer").click()
    for _ in range(100):
        page.wait_for_timeout(200)
        shown = tuple(page.locator(f"#{name} textarea").input_value() for name in ("unsteered", "steered"))
        if shown == answers:
            return
    assert shown == answers


def expected(playground, dials):
    return list(playground.answers(PROMPT, dials))[-1]


def test_slider_changes_only_its_own_users_answer(browser, address, playground):
    first, second = open_page(browser, address), open_page(browser, address)
    before, after = (expected(playground, Dials({"one": multiplier})) for multiplier in (1.0, -2.0))
    assert after[0] == before[0]
    assert after[1] != before[1]
    ask(first, before)
    set_slider(first, "one", -2)
    ask(first, after)
    ask(second, before)


def test_page_works_offline(browser, address, playground):
    page = browser.new_context().new_page()
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    page.route(lambda url: not url.startswith(address), lambda route: route.abort())
    page.goto(address)
    page.locator("#multiplier-one input[type=number]").wait_for()
    page.locator("#prompt textarea").fill(PROMPT)
    ask(page, expected(playground, Dials({"one": 1.0})))
    # Gradio requests fonts and a script from its own servers, and works without them. No user data leaves the machine.
    external = [url for url in requested if not url.startswith((address, "data:", "blob:"))]
    assert all(url.endswith((".js", ".css")) or "fonts" in url for url in external), external


def test_features_can_be_dialled_inspected_and_saved(browser, address, playground, tmp_path):
    page = open_page(browser, address)
    unchanged = expected(playground, Dials({"one": 1.0}))
    ask(page, unchanged)
    page.locator("#features").get_by_text("Features").first.click()
    feature = dial(page, -9)
    changed = expected(playground, Dials({"one": 1.0}, {("one", 1, feature): -9.0}))
    assert changed != unchanged
    ask(page, changed)
    page.locator("#activity").get_by_text("Activations of a feature").first.click()
    page.locator("#show").click()
    page.locator("#marked p").wait_for()
    page.locator("#saving").get_by_text("Save an adapter").first.click()
    page.locator("#name textarea, #name input").fill("mine")
    page.locator("#save").click()
    page.locator("#saved p").wait_for()
    assert (tmp_path / "saved" / "mine" / "adapter_model.safetensors").is_file()
    page.locator("#source textarea, #source input").fill(str(tmp_path / "saved" / "mine"))
    page.locator("#load").click()
    page.locator("#multiplier-mine input[type=number]").wait_for()
    assert playground.adapters == ["one", "two", "mine"]
    layer = steered_layers(playground.model)[0]
    assert float(layer.yapo_code["mine"].data[feature]) == -9
    assert torch.equal(layer.yapo_code["one"].data, random_code(0.4))
    page.locator("#source textarea, #source input").fill("nobody/nothing")
    page.locator("#load").click()
    page.get_by_text("No adapter can be read from").first.wait_for()


def test_features_are_found_on_a_new_adapter_and_dialled(browser, tokenizer, tmp_path):
    model = get_peft_model(make_model(), YaPOConfig(layers=1, sae=make_sae()), "one")
    playground = Playground(model.eval(), tokenizer, tmp_path)
    served = build_page(playground)
    page = open_page(browser, serve_page(served))
    unsteered, same = expected(playground, Dials({"one": 1.0}))
    assert unsteered == same
    ask(page, (unsteered, same))
    page.locator("#features").get_by_text("Features").first.click()
    page.locator("#query textarea, #query input").fill("w1 w9 w3")
    page.locator("#find").click()
    feature = dial(page, 30)
    assert feature == playground.find("one", "w1 w9 w3", "text")["feature"][0]
    changed = expected(playground, Dials({"one": 1.0}, {("one", 1, feature): 30.0}))
    assert changed[1] != unsteered
    ask(page, changed)
    served.close()
