"""Fetches labels of features from Neuronpedia."""

from __future__ import annotations

import json
import logging
import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from .._utils import replacing
from ..sae import SAEIdentity, neuronpedia_id

logger = logging.getLogger(__name__)

_SITE = "https://www.neuronpedia.org"
_TIMEOUT = 10.0


def neuronpedia_link(identity: SAEIdentity, feature: int) -> str | None:
    """The page of a feature; None where sae-lens' directory knows none for this SAE."""
    source = neuronpedia_id(identity.release, identity.sae_id)
    return None if source is None else f"{_site()}/{source}/{feature}"


def neuronpedia_labels(identity: SAEIdentity, features: Iterable[int]) -> dict[int, str]:
    """What Neuronpedia says of features, as far as it can be had.

    Answers are kept beside Hugging Face's caches, also that there is none. Nothing is fetched with `HF_HUB_OFFLINE`,
    and nothing more after the first failure, which is logged.

    Args:
        identity: The features' SAE.
        features: Their indices.

    Returns:
        The first label of each feature that has one.
    """
    source = neuronpedia_id(identity.release, identity.sae_id)
    if source is None:
        return {}
    file = _cache_folder() / f"{source.replace('/', '--')}.json"
    known = _kept(file)
    wanted = [feature for feature in dict.fromkeys(features) if str(feature) not in known]
    if wanted and not _is_offline():
        before = len(known)
        try:
            for feature in wanted:
                known[str(feature)] = _fetched(f"{_site()}/api/feature/{source}/{feature}")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning("Labels of %s could not be fetched from Neuronpedia (%s): some are missing.", source, error)
        if len(known) > before:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                partial.write_text(json.dumps(known, indent=1, ensure_ascii=False), encoding="utf-8")
    found = {feature: known.get(str(feature)) for feature in features}
    return {feature: label for feature, label in found.items() if label}


def _kept(file: Path) -> dict[str, str | None]:
    """The labels of a file; what is none of them is left out, for it can be fetched again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    rows = content.items() if isinstance(content, dict) else ()
    return {feature: label for feature, label in rows if label is None or isinstance(label, str)}


def _fetched(url: str) -> str | None:
    """The first label in an answer of Neuronpedia; None where it has no label.

    Raises:
        OSError: It did not answer.
        ValueError: It answered something else.
    """
    with urllib.request.urlopen(urllib.request.Request(url), timeout=_TIMEOUT) as answer:
        content = json.load(answer)
    labels = [entry.get("description") for entry in content.get("explanations") or []]
    return next((str(label).strip() for label in labels if label), None)


def _site() -> str:
    return os.environ.get("YAPO_NEURONPEDIA", _SITE)


def _is_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "yapo_peft" / "neuronpedia"
