"""What the pages say of the package is what is there."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import yapo_peft
from yapo_peft import errors

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = "\n".join(file.read_text(encoding="utf-8") for file in (DOCS / "reference").glob("*.md"))


@pytest.mark.parametrize("name", ["methods", "data", "evaluation", "interpret", "report", "app", "export"])
def test_the_reference_has_every_public_name(name):
    """A package's page has its names but those of a file of the same name, which need a line of their own."""
    package = import_module(f"yapo_peft.{name}")
    assert re.search(rf"^::: yapo_peft\.{name}$", REFERENCE, re.MULTILINE)
    folder = Path(package.__file__).parent
    for public in package.__all__:
        if (folder / f"{public}.py").is_file():
            assert f"::: yapo_peft.{name}.{public}.{public}\n" in REFERENCE


def test_the_table_of_errors_is_the_tree():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (DOCS / "reference" / "errors.md").read_text(), re.MULTILINE)
    tree = {name: getattr(errors, name) for name in dir(errors) if name.endswith("Error")}
    inner = {name for name, error in tree.items() if error not in (errors.YaPOError, errors.SAEError)}
    assert {name for name, _ in rows} == inner
    for name, builtin in rows:
        assert builtin in {base.__name__ for base in tree[name].__mro__}
        assert name in yapo_peft.__all__


def test_releases_and_ids_of_the_pages_are_in_the_directory():
    """All that are named in a snippet."""
    from yapo_peft.sae.loader import saes_directory

    directory = saes_directory()
    text = "\n".join(file.read_text(encoding="utf-8") for file in [DOCS.parent / "README.md", *DOCS.rglob("*.md")])
    pairs = re.findall(r'sae[_-]release[= ]"?([\w.-]+)"?,?[\s\\]*(?:#.*\s+)?(?:--)?sae[_-]id[= ]\[?"?([\w./-]+)', text)
    pairs += re.findall(r"yapo sae inspect ([\w.-]+) ([\w./-]+)", text)
    assert len(pairs) >= 8
    for release, sae_id in pairs:
        assert sae_id in directory[release].saes_map, (release, sae_id)
