"""What users of the Hub do, each function in a process of its own: huggingface_hub reads its settings on import."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny import D_MODEL, inference_sae, make_model, make_sae, preference_rows, random_code, random_ids, set_code

import yapo_peft
from yapo_cli import main as yapo
from yapo_peft.sae import load_sae
from yapo_peft.sae.directory import _files_on_hub
from yapo_vllm.served import AdapterFile

LAYER = 2


def push(folder: Path) -> None:
    """Pushes a model, its SAE and adapters of several kinds; keeps what each adapter answers."""
    from huggingface_hub import HfApi
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_model().push_to_hub("tester/base")
    AutoTokenizer.from_pretrained(folder / "tokenizer").push_to_hub("tester/base")
    api = HfApi()
    inference_sae(make_sae(layer=LAYER), folder / "sae")
    api.create_repo("tester/saes")
    api.upload_folder(repo_id="tester/saes", folder_path=folder / "sae", path_in_repo="layer_2")

    config = yapo_peft.YaPOConfig(layers=LAYER, sae_release="tester/saes", sae_id="layer_2")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("tester/base"), config).eval()
    expected = {}

    def answers(seed: int, name: str = "default") -> torch.Tensor:
        set_code(model, random_code(seed=seed), name)
        with torch.no_grad():
            return model(random_ids()).logits

    expected["default"] = answers(1)
    model.push_to_hub("tester/adapter")
    yapo_peft.model_card(model, repo_id="tester/adapter", dataset="tester/pairs").push_to_hub("tester/adapter")
    model.push_to_hub("tester/private", private=True)
    api.create_tag("tester/adapter", tag="v1")
    api.create_branch("tester/adapter", branch="next")
    expected["revision"] = answers(2)
    model.push_to_hub("tester/adapter", revision="next")
    model.add_adapter("other", config)
    set_code(model, random_code(seed=1), "default")
    model.set_adapter("other")
    expected["subfolder"] = answers(3, "other")
    model.push_to_hub("tester/adapter")
    expected["trained"] = expected["by the command"] = _train(folder)
    assert yapo(["push", str(folder / "out"), "tester/pushed", "--private", "--self-contained"]) == 0
    _train_sae(folder)
    expected["files of the SAEs"] = _files_on_hub("tester/saes")
    torch.save(expected, folder / "expected.pt")


def _train(folder: Path) -> torch.Tensor:
    from datasets import Dataset
    from transformers import AutoTokenizer

    pairs = Dataset.from_list(preference_rows())
    args = yapo_peft.YaPOTrainingConfig(
        output_dir=str(folder / "out"),
        max_steps=2,
        learning_rate=0.1,
        warmup_steps=0,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=1,
        push_to_hub=True,
        hub_model_id="tester/trained",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = yapo_peft.YaPOTrainer(
        "tester/base",
        args,
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained("tester/base"),
        peft_config=yapo_peft.YaPOConfig(layers=LAYER, sae_release="tester/saes", sae_id="layer_2"),
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="tester/pairs")
    with torch.no_grad():
        return trainer.model.eval()(random_ids()).logits


def _train_sae(folder: Path) -> None:
    """An SAE that the command trained and pushed is found under the name that its card says."""
    from huggingface_hub import ModelCard

    (folder / "text.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(900)))
    options = [
        "--layers",
        "2",
        "--d-sae",
        "32",
        "--l0",
        "8",
        "--batch-size",
        "64",
        "--buffer",
        "1024",
        "--context",
        "16",
    ]
    out = str(folder / "saes")
    train = ["sae", "train", "tester/base", "--dataset", str(folder / "text.txt"), "--out", out, "--tokens", "640"]
    assert yapo([*train, *options]) == 0
    assert yapo(["push", out, "tester/trained-saes"]) == 0
    pushed = load_sae(release="tester/trained-saes", sae_id="layer_2")
    assert pushed.identity.content_hash == load_sae(path=f"{out}/layer_2").identity.content_hash
    card = ModelCard.load("tester/trained-saes").content
    assert 'sae_release="tester/trained-saes", sae_id="layer_2"' in card
    assert 'SAE.from_pretrained("tester/trained-saes", "layer_2")' in card
    assert "base_model: tester/base" in card


def download(folder: Path) -> None:
    """Loads what was pushed; keeps the answers, and the errors of what cannot be loaded."""
    from huggingface_hub import hf_hub_download
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    sources = {
        "default": ("tester/adapter", {}),
        "tag": ("tester/adapter", {"revision": "v1"}),
        "revision": ("tester/adapter", {"revision": "next"}),
        "subfolder": ("tester/adapter", {"subfolder": "other"}),
        "trained": ("tester/trained", {}),
        "by the command": ("tester/pushed", {}),
        "refused": ("tester/private", {"token": False}),
        "private": ("tester/private", {}),
        "unknown": ("tester/adapter", {"revision": "v2"}),
    }
    got = {}
    for name, (repo_id, options) in sources.items():
        try:
            base = AutoModelForCausalLM.from_pretrained("tester/base")
            models = [PeftModel.from_pretrained(base, repo_id, **options)]
            if "subfolder" not in options:  # which PEFT's Auto classes would look for in the base model, too
                models.append(AutoPeftModelForCausalLM.from_pretrained(repo_id, **options))
        except Exception as error:
            got[name] = f"{type(error).__name__}: {error}"
            continue
        with torch.no_grad():
            got[name] = torch.stack([model.eval()(random_ids()).logits for model in models])
    (part,) = AdapterFile(AdapterFile("tester/adapter").folder_in_cache()).parts(D_MODEL).values()
    got["for vLLM"] = part.values
    torch.save(got, folder / "got.pt")
    Path(folder, "card.md").write_text(Path(hf_hub_download("tester/trained", "README.md")).read_text())


if __name__ == "__main__":
    {"push": push, "download": download}[sys.argv[1]](Path(sys.argv[2]))
