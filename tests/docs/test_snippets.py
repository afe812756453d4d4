"""Every snippet of README and docs runs as written, on tiny models under the names of the real ones."""

import json
import re
from pathlib import Path

import pytest
from hub_server import running_hub
from run_pages import FENCE
from test_hub import as_user

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if FENCE.search(file.read_text(encoding="utf-8")) and file.name != "serve.md"  # in tests/serving
    for page in [file.relative_to(ROOT).as_posix()]
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory, tokenizer):
    """What failed, by page."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "work").mkdir()
    out = folder / "failed.json"
    with running_hub() as hub:
        script = Path(__file__).with_name("run_pages.py")
        run = as_user(
            hub, folder / "home", str(script), str(folder / "tokenizer"), str(out), *PAGES, cwd=folder / "work"
        )
    print("\n".join(re.findall(r"^.*\.md: [0-9.]+ s$", run.stdout, re.MULTILINE)))
    assert out.is_file(), run.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(failures, page):
    assert page in failures, "the pages before it ended the run"
    assert not failures[page], "\n".join(failures[page])


def test_no_snippet_is_of_a_language_that_is_not_run():
    """`python` and `bash` are run; a fence without a language shows output or a formula."""
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        languages = set(re.findall(r"^```(\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE))
        assert languages <= {"python", "bash"}, file
