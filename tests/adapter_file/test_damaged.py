"""Damaged adapters: an error that names the file or the field and the cause, before anything is allocated."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from damage import code_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import D_MODEL, D_SAE, make_model, make_sae, random_code, set_code

from yapo_peft import AdapterFileError, UnsupportedOperationError, YaPOConfig, YaPOError
from yapo_peft.adapter_file.reading import SavedAdapter

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = {"sparse": {}, "dense": {"space": "dense"}, "self-contained": {"self_contained": True}}
BAD = [1, -1, 2**40, 10**400, 1.5, float("nan"), True, "", "x", "\x00", [], ["a"], [1, 2], [None], [{}], {}, {"a": 1}]


def save(folder, kind):
    options = KINDS[kind]
    own = {} if kind == "dense" else {"sae": make_sae()}
    model = get_peft_model(make_model(), YaPOConfig(layers=2, **own, **options))
    set_code(model, random_code(d_sae=len(model.get_parameter(code_of(model))), scale=0.2))
    model.save_pretrained(folder)
    return folder


def read(folder):
    saved = SavedAdapter(str(folder))
    for layer in saved.codes(D_MODEL):
        saved.sae(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_with_any_field_of_another_type_is_read_or_refused_by_name(tmp_path, kind):
    file = save(tmp_path, kind) / CONFIG
    config = json.loads(file.read_text())
    identity = (config["sae_identity"] or [{}])[0]
    changed = [{**config, name: value} for name in config for value in BAD]
    changed += [{key: value for key, value in config.items() if key != name} for name in config]
    changed += [{**config, "sae_identity": [{**identity, name: value}]} for name in identity for value in BAD]
    refused = 0
    for other in changed:
        file.write_text(json.dumps(other))
        try:
            read(tmp_path)
        except YaPOError:
            refused += 1
    assert refused > len(changed) / 3


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "[" * 100_000, '{"peft_type": "NO"}', "\x00", "\ud800"])
def test_a_config_that_is_no_config_is_refused(tmp_path, text):
    (save(tmp_path, "dense") / CONFIG).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(AdapterFileError, match="No adapter can be read from"):
        SavedAdapter(str(tmp_path))


def test_what_a_config_claims_is_not_allocated(tmp_path):
    file = save(tmp_path, "self-contained") / CONFIG
    config = json.loads(file.read_text())
    for size in (2**29, 2**40, -1, 0):
        config["sae_identity"][0]["d_sae"] = size
        file.write_text(json.dumps(config))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for load in (read, lambda folder: PeftModel.from_pretrained(make_model(), folder)):
            with pytest.raises(AdapterFileError, match=rf"sae_identity.*'d_sae': {size}"):
                load(tmp_path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


CHANGES = {
    "of another dtype": lambda tensor: tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "2-D": lambda tensor: tensor[None],
    "without a dimension": lambda tensor: tensor.flatten()[0],
    "short": lambda tensor: tensor[:-1],
    "with a flipped bit": lambda tensor: flipped(tensor),
    "NaN": lambda tensor: tensor * float("nan") if tensor.is_floating_point() else tensor.float() * float("nan"),
}


def flipped(tensor):
    data = tensor.clone()
    data.view(torch.uint8).flatten()[3] ^= 1
    return data


@pytest.mark.feature(
    "PEFT", "Files that are damaged, or of another layer or width", refused="with what is wrong in them"
)
@pytest.mark.parametrize("change", [*CHANGES, "missing", "renamed", "of another layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_any_tensor_damaged_is_refused(tmp_path, kind, change):
    file = save(tmp_path, kind) / FILE
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("settings") and change == "of another dtype":
            continue  # the same bytes
        others = {other: value for other, value in tensors.items() if other != name}
        new = {"missing": None, "renamed": name + "x", "of another layer": name.replace(".2.", ".1.")}.get(change, name)
        value = CHANGES[change](tensor).contiguous() if change in CHANGES else tensor
        save_file(others if new is None else {**others, new: value}, file)
        for load in (read, lambda folder: PeftModel.from_pretrained(make_model(), folder)):
            with pytest.raises(YaPOError):
                load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(indices=t["indices"] + D_SAE), rf"names feature \d+, but its SAE has {D_SAE}"),
        (lambda t: t.update(indices=t["indices"] * 0), "names a feature twice"),
        (lambda t: t.update(values=t["values"] / 0), "NaN or infinite"),
        (lambda t: t.update(part_W_dec=t["part_W_dec"][:, 1:]), "SAE's part for layer 2"),
        (lambda t: t.update(part_W_enc=t["part_W_enc"][:, 1:]), "SAE's part for layer 2"),
        (lambda t: t.update(part_b_enc=t["part_b_enc"][None]), "SAE's part for layer 2"),
        (lambda t: t.update(part_threshold=t["part_threshold"] / 0), "SAE's part for layer 2"),
        (lambda t: t.pop("part_threshold"), "SAE's part for layer 2"),
        (lambda t: t.update(part_k=t["part_threshold"] + 1), "SAE's part for layer 2"),
        (lambda t: t.update(part_settings=as_bytes('{"activation": "relu"}')), "no valid part for layer 2 .KeyError"),
        (lambda t: t.update(part_settings=as_bytes("[" * 100_000)), "no valid part for layer 2 .RecursionError"),
    ],
)
def test_what_does_not_fit_is_refused_whatever_its_digest(tmp_path, monkeypatch, change, message):
    file = save(tmp_path, "self-contained") / FILE
    monkeypatch.setattr("yapo_peft.adapter_file.codes._digest", lambda parts: parts[".digest"])
    monkeypatch.setattr("yapo_peft.adapter_file.parts._digest", lambda part, settings, *_: settings["sha256"])
    read(tmp_path)
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in load_file(file).items()}
    change(tensors)
    head = "base_model.model.model.layers.2.yapo.yapo_code"
    save_file({f"{head}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path)


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_are_not_finite_are_not_saved(tmp_path, kind):
    save(tmp_path, kind)
    before = (tmp_path / FILE).read_bytes()
    model = PeftModel.from_pretrained(make_model(), tmp_path)
    code = model.get_parameter(code_of(model))
    code.data[3] = float("inf")
    with pytest.raises(AdapterFileError, match=r"layers\.2.*NaN or infinite, so it cannot be saved"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_pickled_files_are_not_loaded(tmp_path):
    file = save(tmp_path, "sparse") / FILE
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    model = PeftModel.from_pretrained(make_model(), tmp_path)
    file.unlink()
    for load in (read, lambda folder: PeftModel.from_pretrained(make_model(), folder)):
        with pytest.raises(AdapterFileError, match="pickled files can execute code"):
            load(tmp_path)
    with pytest.raises(UnsupportedOperationError, match=r"a pickle, .* save without safe_serialization=False"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
