import subprocess
import sys

import pytest

import yapo_peft
from yapo_peft import errors


def test_what_is_public():
    assert sorted(yapo_peft.__all__) == list(yapo_peft.__all__)
    for name in yapo_peft.__all__:
        assert getattr(yapo_peft, name).__module__.startswith("yapo_peft")
    with pytest.raises(AttributeError, match="no attribute 'YaPOModell'"):
        _ = yapo_peft.YaPOModell


def test_importing_the_package_leaves_heavy_ones_alone():
    code = "import sys, yapo_peft; print([m for m in ('sae_lens', 'trl', 'matplotlib') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_the_method_is_registered_once_and_refuses_a_taken_name(monkeypatch):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from yapo_peft.tuner.registration import register

    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["YAPO"] is yapo_peft.YaPOConfig
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "YAPO", object)
    with pytest.raises(RuntimeError, match="PEFT already has a method named 'YAPO'"):
        register()


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.SAENotFoundError, FileNotFoundError),
        (errors.UnsupportedSAEError, NotImplementedError),
        (errors.SAEMismatchError, ValueError),
        (errors.AdapterFileError, ValueError),
        (errors.DatasetError, ValueError),
        (errors.NonFiniteLossError, FloatingPointError),
        (errors.UnsupportedOperationError, NotImplementedError),
    ],
)
def test_errors_are_also_what_a_caller_would_catch(error, builtin):
    assert issubclass(error, errors.YaPOError)
    assert issubclass(error, builtin)
    assert error.__name__ in (errors.__doc__ or "")
