"""Fetches labels of features from Neuronpedia, and searches them."""

from __future__ import annotations

import json
import logging
import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from .._utils import replacing
from ..errors import ConfigError
from ..sae import SAEIdentity, neuronpedia_id

logger = logging.getLogger(__name__)

_SITE = "https://www.neuronpedia.org"
_TIMEOUT = 10.0
_JSON = {"Content-Type": "application/json"}


def neuronpedia_link(identity: SAEIdentity, feature: int) -> str | None:
    """Returns the URL of a feature's page; None if sae-lens' directory does not list the SAE on Neuronpedia."""
    source = neuronpedia_id(identity.release, identity.sae_id)
    return None if source is None else f"{_site()}/{source}/{feature}"


def neuronpedia_labels(identity: SAEIdentity, features: Iterable[int]) -> dict[int, str]:
    """Returns the labels of features on Neuronpedia, from the cache if possible.

    The cache is in Hugging Face's home folder, and also records features without a label. Nothing is fetched with
    `HF_HUB_OFFLINE`, nor after the first failure, which is logged.

    Args:
        identity: The SAE.
        features: Indices of the features.

    Returns:
        The first label of each feature that has one.
    """
    source = neuronpedia_id(identity.release, identity.sae_id)
    if source is None:
        return {}
    file = Path(constants.HF_HOME) / "yapo_peft" / "neuronpedia" / f"{source.replace('/', '--')}.json"
    known = _cached_labels(file)
    missing = [feature for feature in dict.fromkeys(features) if str(feature) not in known]
    if missing and not constants.HF_HUB_OFFLINE:
        before = len(known)
        try:
            for feature in missing:
                known[str(feature)] = _fetch_label(source, feature)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning("Labels of %s could not be fetched from Neuronpedia (%s); some are missing.", source, error)
        if len(known) > before:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                partial.write_text(json.dumps(known, indent=1, ensure_ascii=False), encoding="utf-8")
    found = {feature: known.get(str(feature)) for feature in features}
    return {feature: label for feature, label in found.items() if label}


def neuronpedia_search(identity: SAEIdentity, query: str) -> list[int]:
    """Returns the features of an SAE whose labels on Neuronpedia are closest to a query.

    Raises:
        ConfigError: Neuronpedia does not have the SAE, or cannot be asked.
    """
    source = neuronpedia_id(identity.release, identity.sae_id)
    if source is None:
        raise ConfigError("Neuronpedia does not have this SAE, as far as sae-lens knows: find features by a text.")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("Labels are searched on Neuronpedia, but HF_HUB_OFFLINE is set: find features by a text.")
    model, _, layer = source.partition("/")
    try:
        results = _asked("explanation/search", {"modelId": model, "layers": [layer], "query": query})["results"]
        found = [int(result["index"]) for result in results]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"Neuronpedia cannot be searched ({error}): find features by a text.") from error
    return list(dict.fromkeys(found))


def _cached_labels(file: Path) -> dict[str, str | None]:
    """Reads cached labels; skips invalid entries, which are then fetched again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    rows = content.items() if isinstance(content, dict) else ()
    return {feature: label for feature, label in rows if label is None or isinstance(label, str)}


def _fetch_label(source: str, feature: int) -> str | None:
    """Fetches the first label of a feature; None if it has none. Raises as `_asked`."""
    content = _asked(f"feature/{source}/{feature}")
    labels = [entry.get("description") for entry in content.get("explanations") or []]
    return next((str(label).strip() for label in labels if label), None)


def _asked(path: str, body: dict[str, Any] | None = None) -> Any:
    """Returns the response of Neuronpedia's API to a GET request, or to a POST request if there is a body.

    Raises:
        OSError: The request failed.
        ValueError: The response is not JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{_site()}/api/{path}", data, {} if data is None else _JSON)
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        return json.load(response)


def _site() -> str:
    return os.environ.get("YAPO_NEURONPEDIA", _SITE)
