"""`yapo push`: upload an adapter, or SAEs that `yapo sae train` trained, to the Hub."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from yapo_peft import YaPOConfig

# Files that users of the adapter need; checkpoints and optimizer states stay here.
_FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "*.png",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
]
# How a card registers a local SAE, which a self-contained adapter does not need.
_REGISTERED = re.compile(r"\nfrom sae_lens import SAE\n\nyapo_peft\.register_sae\(.*\n")
_SAE_FILES = ["layer_*/cfg.json", "layer_*/sae_weights.safetensors", "layer_*/measures.json"]
# The local paths in the snippets of a card, and what they are on the Hub.
_SNIPPETS = {
    r'((?:AutoPeftModelForCausalLM\.from_pretrained\(|PeftModel\.from_pretrained\(model, ))"[^"]*"': r'\1"REPOSITORY"',
    r'SAE\.load_from_disk\("(layer_\d+)"\)': r'SAE.from_pretrained("REPOSITORY", "\1")',
    r'sae_path="(layer_\d+)"': r'sae_release="REPOSITORY", sae_id="\1"',
}


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved adapter, or the output of `yapo sae train`.")],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Hub repository; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Add the parts of its SAEs that the adapter needs.")
    ] = False,
) -> None:
    """Upload an adapter, or trained SAEs, with its card to the Hub.

    Files that training left in the folder are not uploaded. `yapo report ADAPTER --card ...` adds features and a plot
    to the card.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from yapo_peft import ConfigError

    are_saes = any(folder.glob("layer_*/measures.json"))
    if self_contained and not are_saes:
        with tempfile.TemporaryDirectory() as copy:
            return push(_with_saes(folder, Path(copy)), repository, private, revision, message)
    card = ModelCard.load(_card_of_saes(folder) if are_saes else _card_of_adapter(folder))
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is not a valid repository name: must be owner/name.") from error
    api = HfApi()
    repo_id = api.create_repo(repository, private=private, exist_ok=True).repo_id
    for snippet, uploaded in _SNIPPETS.items():
        card.text = re.sub(snippet, uploaded.replace("REPOSITORY", repo_id), card.text)
    message = message or ("Upload SAEs" if are_saes else "Upload a steering adapter")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=_SAE_FILES if are_saes else _FILES,
        revision=revision,
        commit_message=message,
    )
    card.push_to_hub(repo_id, revision=revision, commit_message=message)
    typer.echo(f"Uploaded to {api.endpoint}/{repo_id}.")


def _with_saes(folder: Path, copy: Path) -> Path:
    """Copies an adapter with its card, and makes the copy self-contained."""
    import json

    from safetensors.torch import save_file

    from yapo_peft import ConfigError
    from yapo_peft.adapter_file.reading import SavedAdapter
    from yapo_peft.report.page import require_card

    saved = SavedAdapter(str(folder))
    if saved.config.space == "dense":
        raise ConfigError("--self-contained: the adapter is dense and has no SAE; leave it out.")
    for file in (file for pattern in _FILES for file in folder.glob(pattern)):
        shutil.copy(file, copy)
    save_file(saved.self_contained(), copy / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config = json.dumps({**config, "self_contained": True}, indent=2)
    (copy / "adapter_config.json").write_text(config, encoding="utf-8")
    card = require_card(folder).read_text(encoding="utf-8")
    (copy / "README.md").write_text(_REGISTERED.sub("", card), encoding="utf-8")
    return copy


def _card_of_saes(folder: Path) -> Path:
    from yapo_peft import ConfigError

    if not (folder / "README.md").is_file():
        raise ConfigError(f"The training of the SAEs in {folder} has not ended: repeat its command, which goes on.")
    return folder / "README.md"


def _card_of_adapter(folder: Path) -> Path:
    """The card of an adapter, which must be one of ours. Warns if others cannot load it."""
    from yapo_peft import ConfigError, YaPOConfig
    from yapo_peft.report.page import require_card

    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"No adapter found in {folder}: pass a folder written by save_pretrained, a trainer or yapo sae train."
        )
    config = YaPOConfig.from_pretrained(str(folder))
    if not isinstance(config, YaPOConfig):
        raise ConfigError(f"{folder} has an adapter of another method: push it with PEFT.")
    for name in _local(config):
        print(f"yapo push: warning: others cannot load this adapter: {name}", file=sys.stderr)
    return require_card(folder)


def _local(config: YaPOConfig) -> list[str]:
    """What a config refers to that only exists on this machine."""
    base = config.base_model_name_or_path
    found: list[str] = []
    if base and Path(base).exists():
        found.append(
            f"base_model_name_or_path {base!r} is a local folder; write the model's name on the Hub into "
            "adapter_config.json."
        )
    if config.sae_path and not config.self_contained:
        found.append("its SAE is a local folder; push with --self-contained, or publish the SAE.")
    return found
