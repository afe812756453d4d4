"""Adapters on disk, as servers get them."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from served import HAS_VLLM
from tiny import inference_sae, make_model, make_sae, random_code

from yapo_peft import YaPOConfig
from yapo_peft.tuner.adapters import steered_layers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of vLLM's own engine and server if it is not installed."""
    for item in items:
        if item.get_closest_marker("vllm") and not HAS_VLLM:
            item.add_marker(pytest.mark.skip("vLLM is not installed: make test-vllm"))


@pytest.fixture
def write_adapter(tmp_path: Path):
    """Saves an adapter of the tiny model, with a code of its own at each block, and returns its folder and model."""

    def write(name="polite", kind="jumprelu", layers=(2,), sign=0, seed=1, normalize="none", space="sae", **options):
        config = {"layers": list(layers), "space": space, **options}
        if space == "sae":
            cfg = {} if kind == "batchtopk" else {"normalize_activations": normalize}
            folders = [tmp_path / f"sae-{kind}-{normalize}-{layer}" for layer in layers]
            for layer, folder in zip(layers, folders, strict=True):
                if not folder.exists():
                    inference_sae(make_sae(kind, seed=layer, **cfg), folder)
            config["sae_path"] = [str(folder) for folder in folders]
        model = get_peft_model(make_model(), YaPOConfig(**config))
        for layer in steered_layers(model):
            code = layer.yapo_code["default"]
            drawn = random_code(d_sae=len(code), seed=seed + layer.index)
            code.data.copy_(drawn.abs() * sign if sign else drawn)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name), model.eval()

    return write


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets the plugin's variables, and none but these."""

    def set_variables(**values):
        for name in ("YAPO_ADAPTERS", "YAPO_LAYERS", "YAPO_MAX_ADAPTERS", "YAPO_MAX_FEATURES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(f"YAPO_{name}", str(value))

    set_variables()
    return set_variables


@pytest.fixture
def tokens():
    """Activations of seven tokens, of the tiny model's width."""
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(5)) * 2
