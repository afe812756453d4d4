"""Fixtures, and the settings that keep the tests offline."""

import logging
import os

# Tiny models gain nothing from threads, and processes that share two cores lose by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TQDM_DISABLE", "1")
# Warns on import of a kernel that it could fetch, past what pytest captures of its workers.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import VOCABULARY, inference_sae, make_sae, preference_rows
from transformers import PreTrainedTokenizerFast

import yapo_peft

pytest_plugins = ["combining", "pytester"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def sae_folder(tmp_path: Path) -> Callable[..., str]:
    """Writes an SAE and returns its folder."""

    def write(kind: str = "jumprelu", **options) -> str:
        folder = tmp_path / f"sae-{kind}-{'-'.join(f'{k}{v}' for k, v in options.items())}"
        inference_sae(make_sae(kind, **options), folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", ":", "\n"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    return fast


@pytest.fixture
def pairs() -> Dataset:
    """Eight conversational preference pairs."""
    return Dataset.from_list(preference_rows())


@pytest.fixture
def few_neutral_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neutral text of a few rows, where every training and calibration reads it all."""
    from yapo_peft.scoring import neutral

    rows = neutral.packaged_text()[:4]
    monkeypatch.setattr(neutral, "packaged_text", lambda: rows)


@pytest.fixture
def saved_adapter(tmp_path: Path, tokenizer) -> Path:
    """Folder of a self-contained sparse adapter at block 2; its model and tokenizer are in `tmp_path / "base"`."""
    from peft import get_peft_model
    from tiny import make_model, random_code, set_code

    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = get_peft_model(make_model(), yapo_peft.YaPOConfig(layers=2, sae=make_sae(), self_contained=True))
    set_code(model, random_code(scale=2.0))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which examples find a small model in place of the embedded one."""
    from stand_in import write_stand_in

    cache = tmp_path_factory.mktemp("cache")
    write_stand_in(cache)
    return {"XDG_CACHE_HOME": str(cache)}
