"""`yapo push`: upload an adapter to the Hub."""

from __future__ import annotations

import re
import sys
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


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved adapter.")],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Hub repository; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload a steering adapter",
) -> None:
    """Upload an adapter and its model card to the Hub.

    Files that training left in the folder are not uploaded. `yapo report ADAPTER --card ...` adds features and a plot
    to the card.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from yapo_peft import ConfigError, YaPOConfig
    from yapo_peft.report.page import require_card

    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"No adapter found in {folder}: pass a folder written by save_pretrained or a trainer.")
    config = YaPOConfig.from_pretrained(str(folder))
    if not isinstance(config, YaPOConfig):
        raise ConfigError(f"{folder} has an adapter of another method: push it with PEFT.")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is not a valid repository name: must be owner/name.") from error
    card = ModelCard.load(require_card(folder))
    for name in _local(config):
        print(f"yapo push: warning: others cannot load this adapter: {name}", file=sys.stderr)
    api = HfApi()
    repo_id = api.create_repo(repository, private=private, exist_ok=True).repo_id
    # The card's snippet has the local path.
    card.text = re.sub(
        r'((?:AutoPeftModelForCausalLM\.from_pretrained\(|PeftModel\.from_pretrained\(model, ))"[^"]*"',
        rf'\1"{repo_id}"',
        card.text,
    )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=_FILES, revision=revision, commit_message=message
    )
    card.push_to_hub(repo_id, revision=revision, commit_message=message)
    typer.echo(f"Uploaded to {api.endpoint}/{repo_id}.")


def _local(config: YaPOConfig) -> list[str]:
    """What a config refers to that only exists on this machine."""
    base = config.base_model_name_or_path
    found: list[str] = []
    if base and Path(base).exists():
        found.append(f"base_model_name_or_path {base!r} is a local folder; load the model by its Hub name.")
    if config.sae_path and not config.self_contained:
        found.append("its SAE is a local folder; save it with self_contained=True, or publish the SAE.")
    return found
