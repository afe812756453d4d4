import json

import numpy as np
import pytest
from peft import PeftConfig, get_peft_model
from tiny import DEPTH, make_model, make_sae

from yapo_peft import ConfigError, SAEMismatchError, SAENotFoundError, UnsupportedSAEError, YaPOConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "layers=None: give the index"),
        ({"layers": []}, r"layers=\[\]: give the index"),
        ({"layers": "3"}, "layers='3': give the index"),
        ({"layers": [1.0]}, r"layers=\[1.0\]: give the index"),
        ({"layers": True}, "layers=True: give the index"),
        (
            {"layers": 1, "sae_path": None},
            r"layers=\[1\] have no SAE: give sae_release and sae_id, sae_path, or an SAE object",
        ),
        ({"layers": 1, "sae_release": "r", "sae_path": None}, "sae_release='r' and sae_id=None go together"),
        ({"layers": 1, "sae_release": "r", "sae_id": "i"}, "sae_path='x' and sae_release='r', sae_id='i' are both"),
        ({"layers": [0, 1]}, r"sae_path names 1 SAEs for 2 layers \(\[0, 1\]\): give one per layer"),
        ({"layers": 0, "sae_path": ["x", "y"]}, "sae_path names 2 SAEs for 1 layers"),
        ({"layers": 0, "positions": "first"}, "positions='first': must be 'all', 'completion', 'last'"),
        ({"layers": 0, "multiplier": float("nan")}, "multiplier=nan: must be a finite number"),
        ({"layers": 0, "multiplier": "1"}, "multiplier='1': must be a finite number"),
        ({"layers": 0, "init_weights": "gaussian"}, "init_weights='gaussian': must be one of True"),
        ({"layers": 0, "space": "latent"}, "space='latent': must be one of 'sae', 'dense'"),
        ({"layers": 0, "space": "dense"}, "sae_path='x' has no meaning with space='dense'"),
        (
            {"layers": 0, "space": "dense", "sae_path": None, "self_contained": True},
            "self_contained=True has no meaning",
        ),
        ({"layers": 0, "space": "dense", "sae_path": None, "sae": object()}, "sae= has no meaning with space='dense'"),
    ],
)
def test_bad_values_are_named(options, message):
    options = {"sae_path": "x"} | options
    with pytest.raises(ConfigError, match=message):
        YaPOConfig(**options)


def test_tuples_and_numpy_numbers_become_plain_ones():
    config = YaPOConfig(layers=(np.int64(0), 1), sae_path=["x", "y"], multiplier=np.float32(0.5))
    assert config.layers == [0, 1]
    assert all(type(index) is int for index in config.layers)
    assert type(config.multiplier) is float


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        YaPOConfig(layers=0, sae_path="x", alpha=1)


def test_unknown_task_type_is_refused():
    with pytest.raises(ValueError, match="Invalid task type: 'SONG'"):
        YaPOConfig(layers=0, sae_path="x", task_type="SONG")


def test_one_release_serves_all_layers():
    config = YaPOConfig(layers=[0, 1], sae_release="r", sae_id=["a", "b"])
    assert config.sae_source(1) == {"release": "r", "sae_id": "b", "path": None, "content_hash": None}


def test_survives_json(tmp_path):
    config = YaPOConfig(layers=[0, 3], sae_release="r", sae_id=["a", "b"], multiplier=-0.5, positions="last")
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert "target_modules" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize("layer", [DEPTH, -DEPTH - 1])
def test_layer_out_of_range_names_the_depth(layer):
    with pytest.raises(ConfigError, match=rf"layer {layer}, but the model has {DEPTH} layers: use 0 to {DEPTH - 1}"):
        get_peft_model(make_model(), YaPOConfig(layers=layer, sae=make_sae()))


def test_a_block_named_twice_is_refused():
    with pytest.raises(ConfigError, match=r"layers=\[3, -1\] names a layer twice: .* \[3, 3\]"):
        get_peft_model(make_model(), YaPOConfig(layers=[3, -1], sae=[make_sae(), make_sae()]))


def test_negative_layers_count_from_the_end():
    model = get_peft_model(make_model(), YaPOConfig(layers=-1, sae=make_sae()))
    assert model.peft_config["default"].layers == [DEPTH - 1]


def test_wrong_width_is_refused():
    with pytest.raises(SAEMismatchError, match="layer 1 reads activations of width 48, but the model's are 32 wide"):
        get_peft_model(make_model(), YaPOConfig(layers=1, sae=make_sae(d_in=48)))


def test_the_sae_of_another_layer_is_refused():
    with pytest.raises(SAEMismatchError, match=r"layer 1 was trained on the output of layer 2 .*: use layers=\[2\]"):
        get_peft_model(make_model(), YaPOConfig(layers=1, sae=make_sae("gated", layer=2, seed=5)))


def test_another_hook_point_is_refused():
    sae = make_sae("gated", seed=6)
    sae.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    with pytest.raises(UnsupportedSAEError, match="not the output of a layer"):
        get_peft_model(make_model(), YaPOConfig(layers=1, sae=sae))


def test_missing_sae_is_refused_before_the_model_changes(tmp_path):
    model = make_model()
    with pytest.raises(SAENotFoundError, match="No SAE in"):
        get_peft_model(model, YaPOConfig(layers=1, sae_path=str(tmp_path)))
    assert type(model.model.layers[1]).__name__ == "LlamaDecoderLayer"


def test_sae_and_path_exclude_each_other():
    with pytest.raises(ConfigError, match="Give either sae= or"):
        YaPOConfig(layers=1, sae=make_sae(), sae_path="x")
