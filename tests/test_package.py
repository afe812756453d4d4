import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import yapo_peft
from yapo_peft import errors

ROOT = Path(yapo_peft.__file__).parents[1]
# A package imports only from itself and from those before it.
ORDER = (
    "_version", "errors", "_utils", "sae", "steering", "adapter_file", "tuner", "scoring", "trainer", "methods", "data",
    "evaluation", "interpret", "sae_training", "report", "export", "app", "scripts",
)  # fmt: skip


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports, also within functions, but not for type checkers alone."""
    parts, nodes = file.relative_to(ROOT).parts[:-1], [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def may_import(file: Path, module: str) -> bool:
    """Whether a file of the project may import a module."""
    own, inner = file.relative_to(ROOT).parts[:2]
    inner = inner.removesuffix(".py")
    package, *rest = module.split(".")
    if package == "sae_lens":
        return own == "yapo_peft" and (inner == "sae_training" or (inner, file.name) == ("sae", "loader.py"))
    if package == "trl":
        return inner in ("trainer", "scripts") or (inner, module) in (
            ("data", "trl.extract_prompt"),
            ("train", "trl.cli.accelerate_config.resolve_accelerate_config_argument"),
            ("train", "trl.cli.commands.training._subtract_subsequence"),
        )
    if package == "vllm":
        return own == "yapo_vllm"
    if package != "yapo_peft" or own == "yapo_cli" or inner in ("__init__", "__main__"):
        return True
    target = rest[0] if rest else ""
    if target not in ORDER:  # a public name, from the package itself
        return own == "yapo_vllm" or inner == "scripts"
    if own == "yapo_vllm":
        return target in ORDER[: ORDER.index("tuner") + 1]
    return ORDER.index(target) <= ORDER.index(inner)


def test_packages_import_only_from_those_before_them():
    wrong = set()
    for package in ("yapo_peft", "yapo_cli", "yapo_vllm"):
        for file in (ROOT / package).rglob("*.py"):
            for module in imports(file):
                if not may_import(file, module):
                    depth = 2 if module.startswith("yapo_peft.") else 1
                    wrong.add((file.relative_to(ROOT).as_posix(), ".".join(module.split(".")[:depth])))
    assert not wrong


def test_plugin_has_no_import_cycle():
    files = {f"yapo_vllm.{file.stem}": file for file in (ROOT / "yapo_vllm").glob("*.py") if file.stem != "__init__"}
    graph = {name: {".".join(m.split(".")[:2]) for m in imports(file)} & {*files} for name, file in files.items()}
    assert graph["yapo_vllm.client"]
    # prepare() raises CycleError, which names the files.
    graphlib.TopologicalSorter(graph).prepare()


def test_vllm_is_imported_only_within_functions():
    for file in (ROOT / "yapo_vllm").rglob("*.py"):
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in top if ast.unparse(node).split()[1].split(".")[0] == "vllm"], file


def test_what_is_public():
    assert sorted(yapo_peft.__all__) == list(yapo_peft.__all__)
    for name in yapo_peft.__all__:
        assert getattr(yapo_peft, name).__module__.startswith("yapo_peft")
    with pytest.raises(AttributeError, match="no attribute 'YaPOModell'"):
        _ = yapo_peft.YaPOModell


def test_importing_the_package_leaves_heavy_ones_alone():
    code = "import sys, yapo_peft; print([m for m in ('sae_lens', 'trl', 'matplotlib') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_the_method_is_registered_once_and_refuses_a_taken_name(monkeypatch):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from yapo_peft.tuner.registration import register

    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["YAPO"] is yapo_peft.YaPOConfig
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "YAPO", object)
    with pytest.raises(RuntimeError, match="PEFT already has a method named 'YAPO'"):
        register()


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.SAENotFoundError, FileNotFoundError),
        (errors.UnsupportedSAEError, NotImplementedError),
        (errors.SAEMismatchError, ValueError),
        (errors.AdapterFileError, ValueError),
        (errors.DatasetError, ValueError),
        (errors.NonFiniteLossError, FloatingPointError),
        (errors.UnsupportedOperationError, NotImplementedError),
    ],
)
def test_errors_are_also_what_a_caller_would_catch(error, builtin):
    assert issubclass(error, errors.YaPOError)
    assert issubclass(error, builtin)
    assert error.__name__ in (errors.__doc__ or "")
