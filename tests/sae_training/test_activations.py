"""What SAEs are trained on: which tokens, of which texts, in which order."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import make_model
from tokenizers import AddedToken
from wordy import configured, outputs_of, prepared, texts

from yapo_peft.sae_training import train_saes
from yapo_peft.sae_training.activations import Activations, ActivationStream
from yapo_peft.sae_training.rows import held_out_rows, usable, windows


def test_stored_activations_train_the_same_sae(tmp_path, tokenizer, monkeypatch):
    found = train_saes(make_model(), tokenizer, texts(), configured(), tmp_path / "computed")
    stored = configured(store=str(tmp_path / "store"))
    again = train_saes(make_model(), tokenizer, texts(), stored, tmp_path / "stored")
    assert again[1] == pytest.approx(found[1], rel=1e-3)
    files = [*(tmp_path / "store").iterdir()]
    assert len(files) == 2  # of the text, and of what is held out
    # They are found again; of another model they are not.
    monkeypatch.setattr(Activations, "_write", lambda self, files: pytest.fail("They are computed again."))
    assert train_saes(make_model(), tokenizer, texts(), stored, tmp_path / "again") == again
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        train_saes(make_model(seed=1), tokenizer, texts(), stored, tmp_path / "other")


def test_first_special_and_outlying_tokens_are_left_out_of_all_layers(tokenizer):
    model, config = make_model(), replace(configured([1, 2]), batch_size=64, buffer=1024)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("w9", special=True)])  # as those of chat templates
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("w7")] *= 1000
    found = [f"w1 {text} <eos> w9 w7 w8" for text in texts(40)]
    activations = prepared(model, tokenizer, config, found)
    statistics = activations.statistics()
    stream = iter(ActivationStream(activations, {layer: each.limit for layer, each in statistics.items()}, config))
    allowed = {1: [], 2: []}
    left_out = tokenizer.convert_tokens_to_ids(["w7", "w9", "<eos>"])
    for row in activations.rows:
        assert not usable(row, activations.special)[0]
        kept = [place for place, token in enumerate(row.tolist()) if place and token not in left_out]
        for layer, each in allowed.items():
            each.append(outputs_of(model, layer, row)[kept])
    for _ in range(8):
        batch = next(stream)
        places = []
        for layer, each in allowed.items():
            distances = torch.cdist(batch[layer], torch.cat(each))
            nearest = distances.min(1)
            assert float(nearest.values.max()) < 1e-2
            places.append(nearest.indices)
        # Both layers' rows are of the same tokens.
        same = torch.cat(allowed[2])[places[0]]
        torch.testing.assert_close(batch[2], same, rtol=1e-3, atol=1e-2)


def test_a_pass_over_the_text_uses_each_token_at_most_once(tokenizer):
    model, config = make_model(), replace(configured([1]), batch_size=16, buffer=256)
    activations = prepared(model, tokenizer, config)
    total = sum(int(usable(row, activations.special).sum()) for row in activations.rows)
    stream, seen = ActivationStream(activations, {1: float("inf")}, config), []
    for batch in stream:
        if stream.state_dict()["epoch"] == 1:
            break
        seen.append(batch[1])
    assert total * 0.9 < len(torch.cat(seen)) <= total
    assert len(torch.cat(seen).unique(dim=0)) > 0.95 * len(torch.cat(seen))
    assert not torch.equal(batch[1], seen[0])


def test_of_long_texts_the_end_is_held_out_and_of_short_ones_some(tokenizer):
    long = " ".join(f"w{i % 100}" for i in range(160))
    train, held_out = held_out_rows([long, *texts(19)], tokenizer, 16, 0.1, 10**9)
    first = torch.tensor(tokenizer(long)["input_ids"], dtype=torch.int32).split(16)
    assert all(torch.equal(a, b) for a, b in zip(train, first[:9], strict=False))
    assert torch.equal(held_out[0], first[9])
    read, others = held_out_rows(iter([long] * 10**6), tokenizer, 16, 0.1, 1000)
    assert 1000 <= sum(map(len, read)) < 1200
    assert sum(map(len, others)) < 250
    read, others = held_out_rows([" ".join([long] * 100)], tokenizer, 16, 0.1, 1000)
    assert 1000 <= sum(map(len, read)) < 2000
    assert sum(map(len, others)) < 250


def test_the_answers_to_a_prompt_are_held_out_together(tokenizer):
    rows = [{"prompt": f"w{i} w{i // 7}", "chosen": f" w{side} w3 w4 w5"} for i in range(90) for side in (1, 2)]
    train, held_out = held_out_rows(rows, tokenizer, 16, 0.1, 10**9)
    prompts = [{tuple(row[:2].tolist()) for row in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(held_out) == 2 * len(prompts[1])
    assert 4 < len(prompts[1]) < 18


def test_each_sequence_begins_with_the_token_that_texts_begin_with(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    beginning = deepcopy(tokenizer)
    beginning.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    found = windows(" ".join(f"w{i}" for i in range(40)), beginning, 16)
    plain = windows(" ".join(f"w{i}" for i in range(40)), tokenizer, 15)
    assert all(int(row[0]) == 1 for row in found)
    assert all(torch.equal(row[1:], other) for row, other in zip(found, plain, strict=True))
