"""Training SAEs on a tiny model: what they learn, from what, and that an interrupted run ends as the others do."""

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from tiny import D_SAE, make_model, make_sae
from wordy import configured, outputs_of, prepared, texts

from yapo_peft import ConfigError, DatasetError, UnsupportedSAEError, YaPOConfig
from yapo_peft.sae.loader import read_sae
from yapo_peft.sae_training import measure_sae, train_saes
from yapo_peft.sae_training.saes import continued_sae, save_sae
from yapo_peft.sae_training.training import TrainingLoop
from yapo_peft.tuner.blocks import decoder_blocks


def weights(folder):
    return read_sae(path=str(folder)).state_dict()


def test_saes_of_two_layers_explain_their_outputs_and_can_be_steered_with(tmp_path, tokenizer):
    model = make_model()
    measures = train_saes(model, tokenizer, texts(), configured([2, -3]), tmp_path / "saes")
    assert list(measures) == [1, 2]
    for layer, found in measures.items():
        folder = tmp_path / "saes" / f"layer_{layer}"
        assert 0.5 < found["explained_variance"] < 1
        assert 5 < found["l0"] < 12
        assert found["loss_recovered"] > 0.5
        assert found == json.loads((folder / "measures.json").read_text())
        assert f"| {found['explained_variance']:.4f} |" in (tmp_path / "saes" / "README.md").read_text()
        sae = read_sae(path=str(folder))
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=1e-3, atol=1e-3)
        get_peft_model(make_model(), YaPOConfig(layers=layer, sae_path=str(folder)))
    assert sorted(path.name for path in (tmp_path / "saes").iterdir()) == [
        "README.md",
        "layer_1",
        "layer_2",
        "run.json",
    ]


@pytest.mark.parametrize("architecture", ["matryoshka_batchtopk", "jumprelu", "topk"])
def test_each_architecture_learns_to_the_number_of_features_asked_for(tmp_path, tokenizer, architecture):
    config = configured(architecture=architecture, tokens=51_200)
    found = train_saes(make_model(), tokenizer, texts(), config, tmp_path)[1]
    assert 0.4 < found["explained_variance"] < 1
    assert 4 < found["l0"] < 20
    sae = read_sae(path=str(tmp_path / "layer_1"))
    assert sae.cfg.architecture() == ("topk" if architecture == "topk" else "jumprelu")
    assert sae.cfg.metadata.training_architecture == architecture
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


def test_measures_are_those_of_the_definition(tmp_path, tokenizer):
    """Explained variance, L0 and losses, computed token by token from the model's hidden states."""
    model, layer, found = make_model(), 1, texts(6)
    sae = make_sae("jumprelu", layer=layer).requires_grad_(False)
    sae.save_model(tmp_path)
    measured = measure_sae(model, tokenizer, found, path=str(tmp_path), context=16, batch_size=4)
    rows = [row for text in found for row in torch.tensor(tokenizer(text)["input_ids"]).split(16) if len(row) >= 4]
    kept = torch.cat([outputs_of(model, layer, row)[1:] for row in rows])
    features = sae.encode(kept)
    variance = (kept - kept.mean(0)).square().sum()
    assert measured["tokens"] == len(kept)
    assert measured["l0"] == pytest.approx(float((features > 0).sum(1).float().mean()))
    assert measured["dead_features"] == pytest.approx(float((features == 0).all(0).float().mean()))
    error = (sae.decode(features) - kept).square().sum()
    assert measured["explained_variance"] == pytest.approx(float(1 - error / variance), abs=1e-5)

    def loss(change):
        def hook(module, args, output):
            h = output if isinstance(output, torch.Tensor) else output[0]
            h = torch.cat([h[:, :1], change(h[:, 1:])], 1)
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        handle, total, count = decoder_blocks(model)[1][layer].register_forward_hook(hook), 0.0, 0
        with torch.no_grad():
            for row in rows:
                total += float(model(row[None], labels=row[None]).loss) * (len(row) - 1)
                count += len(row) - 1
        handle.remove()
        return total / count

    expected = {
        "loss": loss(lambda h: h),
        "loss_with_reconstruction": loss(sae),
        "loss_with_mean": loss(lambda h: kept.mean(0).expand_as(h)),
        "loss_with_zero": loss(torch.zeros_like),
    }
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, tokenizer, monkeypatch, architecture):
    config = configured([1, 2], save_steps=30, architecture=architecture)
    whole = train_saes(make_model(), tokenizer, texts(), config, tmp_path / "whole")
    save, saved = TrainingLoop._save, []

    def interrupted(self):
        save(self)
        saved.append(self._step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_saes(make_model(), tokenizer, texts(), config, tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-60"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.003 before, 0\.001 now"):
        train_saes(make_model(), tokenizer, texts(), replace(config, learning_rate=1e-3), tmp_path / "parts")
    assert train_saes(make_model(), tokenizer, texts(), config, tmp_path / "parts") == whole
    for layer in (1, 2):
        expected = weights(tmp_path / "whole" / f"layer_{layer}")
        for name, value in weights(tmp_path / "parts" / f"layer_{layer}").items():
            assert torch.equal(value, expected[name]), name
    assert not [*(tmp_path / "parts").glob("checkpoint-*")]


@pytest.mark.parametrize("kind", ["jumprelu", "standard", "topk"])
@pytest.mark.parametrize("subtract", [True, False])
def test_an_sae_to_continue_with_starts_as_it_is(tmp_path, tokenizer, kind, subtract):
    model, config = make_model(), replace(configured([1]), d_sae=None, l0=None)
    statistics = prepared(model, tokenizer, config).statistics()[1]
    start = make_sae(kind, layer=1, apply_b_dec_to_input=subtract)
    h = prepared(model, tokenizer, config).of([0, 1], None)[1]
    expected = start.encode(h)
    sae = continued_sae(start, 24.0, statistics, config)
    scaled, _ = sae.encode_with_hidden_pre(h * statistics.scale)
    norms = start.W_dec.norm(dim=1) if kind != "topk" else 1.0
    torch.testing.assert_close(scaled, expected * norms * statistics.scale, rtol=1e-4, atol=1e-4)
    save_sae(sae, statistics.scale, tmp_path / "sae", config)
    saved = read_sae(path=str(tmp_path / "sae"))
    torch.testing.assert_close(saved.decode(saved.encode(h)), start.decode(expected), rtol=1e-4, atol=1e-4)


def test_continuing_with_an_sae_fits_it_to_another_model_and_keeps_its_features(tmp_path, tokenizer):
    config = configured(architecture="jumprelu", tokens=25_600)
    train_saes(make_model(), tokenizer, texts(), config, tmp_path / "first")
    tuned = make_model()
    with torch.no_grad():
        for layer in tuned.model.layers[:2]:
            layer.mlp.down_proj.weight.copy_(torch.randn_like(layer.mlp.down_proj.weight) * 3)
    start = read_sae(path=str(tmp_path / "first" / "layer_1"))
    before = measure_sae(tuned, tokenizer, texts(50, seed=1), path=str(tmp_path / "first" / "layer_1"), context=16)
    continued = configured(architecture=None, d_sae=None, l0=None, learning_rate=1e-3)
    after = train_saes(
        tuned, tokenizer, texts(), continued, tmp_path / "second", held_out=texts(50, seed=1), start={1: start}
    )[1]
    assert after["explained_variance"] > before["explained_variance"] + 0.02
    assert after["l0"] == pytest.approx(before["l0"], rel=0.35)
    after_it = read_sae(path=str(tmp_path / "second" / "layer_1"))
    kept = torch.cosine_similarity(start.W_dec.detach(), after_it.W_dec.detach())
    assert float(kept.median()) > 0.9
    page = (tmp_path / "second" / "README.md").read_text()
    assert "| on held-out text | layer 1, before | layer 1 |" in page
    assert f"| explained variance | {before['explained_variance']:.4f} | {after['explained_variance']:.4f} |" in page


def test_a_wandb_run_gets_what_the_bar_shows(tmp_path, tokenizer, monkeypatch):
    import wandb

    logged = []

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def log(self, values, step):
            logged.append((step, values))

    monkeypatch.setattr(wandb, "init", lambda **options: Run())
    train_saes(make_model(), tokenizer, texts(), configured([1, 2], report_to="wandb"), tmp_path)
    assert [step for step, _ in logged] == [1, 21, 41, 61, 81, 100]
    assert {"layer_1/metrics/explained_variance", "layer_2/sparsity/dead_features"} <= set(logged[0][1])
    assert logged[-1][1]["layer_1/metrics/explained_variance"] > logged[0][1]["layer_1/metrics/explained_variance"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [9]}, "names layer 9, but the model has 4 layers"),
        ({"layers": []}, "must be a whole number or a list"),
        ({"architecture": "gated"}, "architecture='gated': must be one of"),
        ({"l0": 65}, "must be positive, and not more than the features"),
        ({"l0": 8.5, "architecture": "topk"}, "must be a whole number for 'topk'"),
        ({"tokens": 100}, "must be at least batch_size=128, one step"),
        ({"buffer": 1000}, "must be at least 16 batches, 2048 tokens"),
        ({"eval_split": 0.6}, "must be positive, and at most 0.5"),
        ({"learning_rate": 0}, "must be positive"),
        ({"dtype": "int8"}, "dtype='int8': must be one of"),
        ({"report_to": "tensorboard"}, "report_to='tensorboard': must be one of"),
    ],
)
def test_bad_settings_are_named(tmp_path, tokenizer, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_saes(make_model(), tokenizer, texts(), configured(**changes), tmp_path)


def test_too_little_text_and_unfit_saes_are_named(tmp_path, tokenizer):
    with pytest.raises(DatasetError, match="0 to hold out: pass more text"):
        train_saes(make_model(), tokenizer, texts(3), configured(), tmp_path)
    with pytest.raises(DatasetError, match="fewer tokens than batch_size=128"):
        train_saes(make_model(), tokenizer, texts(2), configured(), tmp_path / "few", held_out=texts(2))
    with pytest.raises(ConfigError, match=r"SAEs for layers \[2\]: must be those of layers=\[1\]"):
        train_saes(make_model(), tokenizer, texts(), configured(), tmp_path, start={2: make_sae()})
    plain = {"d_sae": None, "l0": None}
    for start, changes, message in (
        (make_sae(d_in=16), plain, "reads width 16"),
        (make_sae(), {"d_sae": 32, "l0": 8}, f"has {D_SAE} features"),
        (make_sae(), {**plain, "architecture": "topk"}, "is trained on as 'jumprelu'"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_saes(make_model(), tokenizer, texts(), configured(**changes), tmp_path / "x", start={1: start})
    with pytest.raises(UnsupportedSAEError, match="architecture 'gated'"):
        train_saes(make_model(), tokenizer, texts(), configured(**plain), tmp_path / "y", start={1: make_sae("gated")})
