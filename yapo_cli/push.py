"""`yapo push`: a saved adapter on the Hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

# What a user of the adapter needs, and not what its training left there.
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
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; made if there is none.")
    ],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a steering adapter",
) -> None:
    """Push an adapter with its card, and nothing that training left beside it.

    `yapo report ADAPTER --card ...` puts features and a picture into the card before.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from yapo_peft import ConfigError, YaPOConfig
    from yapo_peft.report.page import require_card

    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"There is no adapter in {folder}: give the folder that save_pretrained or a trainer wrote.")
    config = YaPOConfig.from_pretrained(str(folder))
    if not isinstance(config, YaPOConfig):
        raise ConfigError(f"{folder} holds an adapter of another method: push that with its own library.")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is no name of a repository: write it as owner/name.") from error
    card = ModelCard.load(require_card(folder))
    for name in _local(config):
        print(f"yapo push: others cannot load it as it is: {name}", file=sys.stderr)
    api = HfApi()
    repo_id = api.create_repo(repository, private=private, exist_ok=True).repo_id
    # The snippet loads it from where it is now.
    card.text = re.sub(r'(AutoPeftModelForCausalLM\.from_pretrained\()"[^"]*"', rf'\1"{repo_id}"', card.text)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=_FILES, revision=revision, commit_message=message
    )
    api.upload_file(
        repo_id=repo_id,
        path_or_fileobj=str(card).encode(),
        path_in_repo="README.md",
        revision=revision,
        commit_message=message,
    )
    typer.echo(f"It is at {api.endpoint}/{repo_id}.")


def _local(config: object) -> list[str]:
    """What a config names that is on this machine alone."""
    base = getattr(config, "base_model_name_or_path", None)
    found: list[str] = []
    if base and Path(base).exists():
        found.append(f"base_model_name_or_path {base!r} is a folder of this machine; load the model by its Hub name.")
    if getattr(config, "sae_path", None) and not getattr(config, "self_contained", False):
        found.append("its SAE is a folder of this machine; save it with self_contained=True, or publish the SAE.")
    return found
