"""What requests ask for, and what the environment says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from yapo_peft.errors import ConfigError
from yapo_vllm.request import cache_salt, steering_of
from yapo_vllm.served import Served
from yapo_vllm.settings import Settings


def served(id=1, name="polite", signs=(-1, 1), positions="all", digest="d", multiplier=1.5):
    return Served(id, id - 1, name, "folder", digest, (2,), 4, positions, multiplier, signs)


ADAPTERS = {"polite": served(), "brief": served(2, "brief"), "top": served(3, "top", signs=(1,))}
ADAPTERS["big"] = served(4, "big", multiplier=5000.0)


@pytest.mark.feature("vLLM", "`extra_args` and `vllm_xargs`: objects, texts, JSON, several adapters")
@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"adapter": "polite", "multiplier": -2}, {"polite": -2.0}),
        ({"adapter": "polite"}, {"polite": 1.5}),
        ({"adapter": "polite", "multiplier": None}, {"polite": 1.5}),
        (
            [{"adapter": "brief", "multiplier": 1}, {"adapter": "polite", "multiplier": 0.5}],
            {"polite": 0.5, "brief": 1.0},
        ),
        ("polite", {"polite": 1.5}),
        ("polite=-0.5", {"polite": -0.5}),
        (" polite = 1 , brief=2e-1", {"polite": 1.0, "brief": 0.2}),
        (["polite=1", "brief"], {"polite": 1.0, "brief": 1.5}),
        (json.dumps({"adapter": "polite", "multiplier": 3}), {"polite": 3.0}),
        (json.dumps([{"adapter": "polite"}]), {"polite": 1.5}),
        ("polite=1,", {"polite": 1.0}),
        ("polite=0", {}),
        ("top=2", {"top": 2.0}),
        ("top=0", {}),
    ],
    ids=str,
)
def test_steering_of_parses_all_forms(value, wanted):
    assert {adapter.name: multiplier for adapter, multiplier in steering_of(value, ADAPTERS)} == wanted


@pytest.mark.feature("vLLM", "Unknown adapters and malformed multipliers: an error of status 400")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("rude", "no adapter 'rude'. Served: 'big', 'brief', 'polite', 'top'."),
        ({"adapter": "rude"}, "no adapter 'rude'"),
        ("polite=much", "'much' is not a number"),
        ("polite=", "'' is not a number"),
        ("polite=nan", "is nan: must be a finite number"),
        ("polite=inf", "is inf: must be a finite number"),
        ("polite=1e4", "must be between -1000 and 1000"),
        ({"adapter": "polite", "multiplier": "1"}, "is '1': must be a finite number"),
        ({"adapter": "polite", "multiplier": True}, "is True: must be a finite number"),
        ({"adapter": "polite", "multiplier": [1]}, "must be a finite number"),
        ({"adapter": "polite", "strength": 1}, "unknown key 'strength'"),
        ({"adapter": 3}, "'adapter' must be a name"),
        ({}, "'adapter' must be a name"),
        ("", "names no adapter"),
        (" , ", "names no adapter"),
        ("polite=1_0", "'1_0' is not a number"),
        ({"adapter": "polite", "multiplier": 10**400}, "must be between"),
        ({"adapter": "polite", "multiplier": -(10**5000)}, "a number of very many digits: must be between"),
        ("[" * 20000, "is not valid JSON"),
        ("x" * 10**6, "characters). Served"),
        ("big", "must be between -1000 and 1000"),
        ([], "names no adapter"),
        (None, "give {"),
        (1.5, "give {"),
        ("{polite", "is not valid JSON"),
        ("polite,polite=2", "named twice"),
        ("top=-1", "lowers features of a TopK SAE at multiplier -1"),
        ([["polite", 1]], "give {"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, dict) else "object",
)
def test_steering_of_rejects_malformed_requests(value, message):
    with pytest.raises(ConfigError) as refused:
        steering_of(value, ADAPTERS)
    assert message in str(refused.value)


def test_error_says_that_no_adapter_is_served():
    with pytest.raises(ConfigError, match=r"no adapter 'polite'\. Served: none\."):
        steering_of("polite", {})


@pytest.mark.feature("vLLM", "Prefix caching: a prefix is used again only under the same steering")
def test_cache_salt_is_shared_by_equal_steering_only():
    base = cache_salt([(served(), 1.0)], 10, None)
    assert base == cache_salt([(served(), 1.0)], 12, None)
    # Whatever its name and number, it is the same adapter.
    assert base == cache_salt([(served(7, "other"), 1.0)], 10, None)
    different = [
        cache_salt([(served(), 1.0)], 10, "user"),
        cache_salt([(served(), math.nextafter(1.0, 2.0))], 10, None),
        cache_salt([(served(), -1.0)], 10, None),
        cache_salt([(served(digest="e"), 1.0)], 10, None),
        cache_salt([(served(), 1.0), (served(2, digest="e"), 1.0)], 10, None),
    ]
    assert len({base, *different}) == len(different) + 1


@pytest.mark.parametrize("positions", ["all", "completion", "last", "prompt[:4]", "prompt[-4:]", "completion[2:4]"])
def test_cache_salt_depends_on_the_steered_tokens(positions):
    adapter = served(positions=positions)
    same = cache_salt([(adapter, 1.0)], 10, None) == cache_salt([(adapter, 1.0)], 11, None)
    assert same == (positions in ("all", "prompt[:4]"))


def test_settings_are_read_from_the_environment():
    settings = Settings.of({
        "YAPO_ADAPTERS": " polite=/models/p=1 , me/brief-gemma,home=~/x",
        "YAPO_LAYERS": "14,3",
        "YAPO_MAX_ADAPTERS": "12",
        "YAPO_MAX_FEATURES": "512",
    })  # fmt: skip
    assert settings.adapters == {
        "polite": "/models/p=1",
        "brief-gemma": "me/brief-gemma",
        "home": str(Path.home() / "x"),
    }
    assert (settings.layers, settings.max_adapters, settings.max_features) == ((3, 14), 12, 512)
    assert settings.is_active
    assert not Settings.of({}).is_active
    assert Settings.of({"YAPO_LAYERS": "0"}).is_active
    assert Settings.of({"YAPO_ADAPTERS": ",".join(f"a{i}=x" for i in range(9))}).max_adapters == 9


def test_routes_load_from_the_named_folders_only(tmp_path):
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    settings = Settings.of({"YAPO_FOLDERS": f"{tmp_path / 'a'}, /models"})
    assert settings.allowed(str(tmp_path / "a" / "inner")) == str(tmp_path / "a" / "inner")
    for path in (tmp_path / "b", tmp_path / "a" / ".." / "b", tmp_path / "a" / "link", tmp_path / "ab", "me/brief"):
        with pytest.raises(ConfigError, match="in none of the folders"):
            settings.allowed(str(path))
    with pytest.raises(ConfigError, match="start it with YAPO_FOLDERS"):
        Settings.of({}).allowed(str(tmp_path))


def test_plugin_imports_nothing_heavy():
    code = "import sys, yapo_vllm.plugin; print(*sorted({'torch', 'peft', 'yapo_peft', 'vllm'} & {*sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"YAPO_ADAPTERS": "a=x,a=y"}, "names 'a' twice"),
        ({"YAPO_ADAPTERS": "x/a,y/a"}, "names 'a' twice"),
        ({"YAPO_ADAPTERS": "a[0]=x"}, "must be printable"),
        ({"YAPO_LAYERS": "-1"}, "YAPO_LAYERS='-1': must be indices"),
        ({"YAPO_LAYERS": "all"}, "must be indices of layers"),
        ({"YAPO_MAX_ADAPTERS": "0"}, "YAPO_MAX_ADAPTERS='0': must be a whole number"),
        ({"YAPO_MAX_FEATURES": "1.5"}, "YAPO_MAX_FEATURES='1.5': must be a whole number"),
        ({"YAPO_ADAPTERS": "a=x,b=y", "YAPO_MAX_ADAPTERS": "1"}, "YAPO_MAX_ADAPTERS=1, but YAPO_ADAPTERS names 2"),
    ],
    ids=str,
)
def test_settings_reject_invalid_variables(variables, message):
    with pytest.raises(ConfigError) as refused:
        Settings.of(variables)
    assert message in str(refused.value)
