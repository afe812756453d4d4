"""Adapters and requests as servers read them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from parts_of_vllm import model_config, request
from peft import LoraConfig, get_peft_model
from tiny import D_MODEL, DEPTH, make_model

from yapo_peft.errors import (
    AdapterFileError,
    ConfigError,
    SAEMismatchError,
    SAENotFoundError,
    UnsupportedOperationError,
)
from yapo_vllm import KEY
from yapo_vllm.frontend import Frontend
from yapo_vllm.served import AdapterFile, Served


def describe(folder, name="polite"):
    return AdapterFile(folder).describe(1, 0, name, D_MODEL, DEPTH)


@pytest.mark.parametrize("self_contained", [False, True])
def test_an_adapter_is_described_without_its_sae(write_adapter, self_contained, monkeypatch):
    folder, model = write_adapter(layers=(1, 2), positions="last", self_contained=self_contained)
    monkeypatch.setattr("yapo_peft.tuner.config.load_sae", lambda **source: pytest.fail("read an SAE"))
    found = describe(folder)
    counts = [int(p.count_nonzero()) for n, p in model.named_parameters() if "yapo_code" in n]
    assert (found.layers, found.positions, found.multiplier, found.signs) == ((1, 2), "last", 1.0, (-1, 1))
    assert found.features == max(counts)
    assert Served.from_dict(found.to_dict()) == found


def test_digest_depends_on_codes_saes_positions_and_mode(write_adapter):
    folder, _ = write_adapter("one")
    same, _ = write_adapter("same", self_contained=True)
    others = [write_adapter("code", seed=2)[0], write_adapter("tokens", positions="last")[0]]
    others += [
        write_adapter("held", mode="clamp")[0],
        write_adapter("sae", kind="gated")[0],
        write_adapter("layer", layers=(1,))[0],
    ]
    digests = [describe(path).digest for path in (folder, *others)]
    assert describe(same).digest == digests[0]
    assert len(set(digests)) == len(digests)


def test_describe_rejects_adapters_that_cannot_be_served(write_adapter, tmp_path):
    folder, _ = write_adapter(layers=(3,))
    file = AdapterFile(folder)
    with pytest.raises(SAEMismatchError, match="steers layer 3, but the served model has 3"):
        file.describe(1, 0, "polite", D_MODEL, 3)
    with pytest.raises(SAEMismatchError, match="width 32, but the served model has width 64"):
        file.describe(1, 0, "polite", 64, DEPTH)
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="of PEFT's method LORA, not of YaPO"):
        AdapterFile(str(tmp_path / "lora"))
    weights = Path(folder, "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(AdapterFileError, match="truncated"):
        AdapterFile(folder)


def test_parts_rejects_another_sae(write_adapter, tmp_path, monkeypatch):
    # Other tests hand SAEs in, which stay for the life of the process.
    monkeypatch.setattr("yapo_peft.sae.loader._registered", {})
    folder, model = write_adapter()
    sae = Path(model.peft_config["default"].sae_path[0])
    write_adapter("other", kind="standard")
    sae.rename(tmp_path / "gone")
    with pytest.raises(SAENotFoundError):
        AdapterFile(folder).parts(D_MODEL)
    (tmp_path / "sae-standard-none-2").rename(sae)
    with pytest.raises(SAEMismatchError, match="is not the one that the adapter was trained on"):
        AdapterFile(folder).parts(D_MODEL)


def test_frontend_checks_adapters_at_start(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"polite={folder},gone={folder}-not")
    with pytest.raises(ConfigError, match="YAPO_ADAPTERS: 'gone' cannot be served from"):
        Frontend.at_start(model_config())
    environment(ADAPTERS=f"polite={folder}")
    assert set(Frontend.at_start(model_config()).adapters) == {"polite"}
    with pytest.raises(ConfigError, match="it is for another model"):
        Frontend.at_start(model_config(d_model=64))
    environment(ADAPTERS=f"polite={folder}", LAYERS="9")
    with pytest.raises(ConfigError, match="YAPO_LAYERS names layer 9, but the served model has layers 0 to 3"):
        Frontend.at_start(model_config())
    environment(ADAPTERS=f"polite={folder}", MAX_FEATURES="3")
    with pytest.raises(UnsupportedOperationError, match="YAPO_MAX_FEATURES"):
        Frontend.at_start(model_config())


def test_frontend_encodes_requests_as_ids_and_a_salt(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"polite={folder},again={folder}")
    frontend = Frontend.at_start(model_config())
    arguments = {KEY: "again=0.5", "other": 1}
    read = frontend.read(request(**arguments))
    assert read.sampling_params.extra_args == {KEY: [[2, 0.5]], "other": 1}
    assert read.cache_salt.startswith("yapo:")
    assert arguments == {KEY: "again=0.5", "other": 1}
    for plain in (request(), request(other=1), request(**{KEY: "polite=0"})):
        read = frontend.read(plain)
        assert KEY not in (read.sampling_params.extra_args or {})
        assert read.cache_salt is None
    assert frontend.read(SimpleNamespace(sampling_params=None)).sampling_params is None
