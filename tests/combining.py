"""The markers `combine` and `full`, and the option `--full`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product

import pytest
from pairwise import cover


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run all combinations of parameters, and tests marked full")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: runs with --full only")
    config.addinivalue_line(
        "markers",
        "combine(**axes): parametrises over a list of values, or a dict of values by id, for each name; those of the "
        "module hold for every test that takes the name. All combinations with --full, else a cover of the pairs",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    axes: dict[str, Mapping | Iterable] = {}
    for marker in metafunc.definition.iter_markers("combine"):
        axes = marker.kwargs | axes
    axes = {name: values for name, values in axes.items() if name in metafunc.fixturenames}
    if not axes:
        return
    named = [list(_named(axis, values).items()) for axis, values in axes.items()]
    sizes = [len(values) for values in named]
    full = metafunc.config.getoption("--full")
    rows = product(*map(range, sizes)) if full else cover(sizes, metafunc.definition.name)
    chosen = [[values[index] for values, index in zip(named, row, strict=True)] for row in rows]
    parameters = [pytest.param(*(v for _, v in row), id="-".join(n for n, _ in row)) for row in chosen]
    metafunc.parametrize(list(axes), parameters)


def _named(axis: str, values: Mapping | Iterable) -> dict[str, object]:
    if isinstance(values, Mapping):
        return dict(values)
    plain = (str, int, float, type(None))
    return {
        str(value) if isinstance(value, plain) else getattr(value, "__name__", f"{axis}{index}"): value
        for index, value in enumerate(values)
    }


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    # Files with slow tests first, so that no worker is left with one when the others have nothing to do any more.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
