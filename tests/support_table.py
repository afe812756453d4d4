"""Writes docs/support.md from the `feature` markers of the tests, as `make support`."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "support.md"
AREAS = (
    "PEFT",
    "Beyond PEFT",
    "With LoRA",
    "SAEs",
    "transformers",
    "Architectures",
    "Training",
    "Speed",
    "Methods",
    "Data",
    "Evaluation",
    "Reading",
    "TRL",
    "Many processes",
    "Devices",
    "Hub",
    "Exports",
    "vLLM",
    "Commands",
)
HEAD = """\
# What works, and what does not

Look up whether a feature of PEFT, transformers, TRL or accelerate works with steering adapters. Each row is tested with
every change: "works" means that tests use the feature, and "not supported" that a test checks for the error (or for the
warning, where PEFT goes on without it). The page is generated from the tests by `make support`.
"""


class _Markers:
    """Keeps the marked tests of a collection, as (area, text, status): files."""

    def __init__(self) -> None:
        self.features: dict[tuple[str, str, str], set[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("feature"):
                area, text = marker.args
                file = item.path.relative_to(ROOT).as_posix()
                self.features.setdefault((area, text, _status(**marker.kwargs)), set()).add(file)


def _status(refused: str | None = None, needs: str | None = None) -> str:
    if refused is not None:
        return f"not supported: {refused}"
    return "works" if needs is None else f"needs {needs}; untested here"


def support_table() -> str:
    """The page, from a collection of all tests."""
    markers = _Markers()
    with redirect_stdout(StringIO()):
        failed = pytest.main(["--collect-only", "-qq", str(ROOT / "tests")], [markers])
    if failed or not markers.features:
        raise RuntimeError("The tests cannot be collected.")
    unknown = {area for area, _, _ in markers.features} - set(AREAS)
    if unknown:
        raise RuntimeError(f"Markers name areas that are not in AREAS: {sorted(unknown)}")
    parts = [HEAD]
    for area in AREAS:
        rows = [
            f"| {text} | {status} | {', '.join(f'[{Path(file).stem}](../{file})' for file in sorted(files))} |"
            for (of, text, status), files in markers.features.items()
            if of == area
        ]
        order = sorted(rows, key=lambda row: ("| not supported" in row, "| needs" in row))
        parts.append("\n".join([f"## {area}\n", "| feature | status | tests |", "|---|---|---|", *order]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TABLE.write_text(support_table())
