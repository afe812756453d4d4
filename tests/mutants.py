"""Checks that the tests detect faults: applies one small fault at a time to a copy of the tree, and runs some tests.

    python tests/mutants.py [--full] [NAME ...]

A mutant is killed if a test fails. Exits with 1 if one survives, or if its text is not in the file any more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("yapo_peft", "yapo_cli", "yapo_vllm", "tests", "examples", "pyproject.toml")
FAST = "tests/steering/test_fast_paths.py"
FORMULA = "tests/steering/test_formula.py"
CONTRACT = "tests/test_peft_contract.py"
TRAINER = "tests/trainer/test_trainer.py"
CACHE = "tests/trainer/test_cache.py"
SWEEP = "tests/evaluation/test_sweep.py"


@dataclass(frozen=True)
class Mutant:
    """A fault: some text of a file, what replaces it, and the test files that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, f"yapo_peft/{file}", old, new, tests)


MUTANTS = (
    _mutant(
        "cut-at-zero",
        "steering/formula.py",
        "features + wanted <= 0, -features",
        "features + wanted < 0, -features",
        FAST,
        FORMULA,
    ),
    _mutant("cut-to-nothing", "steering/formula.py", "<= 0, -features, wanted)", "<= 0, wanted, wanted)", FORMULA),
    _mutant("no-rescale", "steering/formula.py", "        shift = shift * scale\n", "        pass\n", FORMULA),
    _mutant(
        "vector-of-sign",
        "steering/formula.py",
        "sign * code < 0, 0)",
        "sign * code > 0, 0)",
        "tests/steering/test_vector.py",
    ),
    _mutant(
        "learning-up",
        "steering/learning.py",
        "up = torch.where(entries < 0, 0.0, entries) @ rows",
        "up = entries @ rows",
        FAST,
    ),
    _mutant(
        "learning-clip", "steering/learning.py", "-torch.minimum(active.value[cut], -wanted[cut])", "wanted[cut]", FAST
    ),
    _mutant(
        "gradient-of-zeros", "steering/learning.py", "learning = (~(wanted > 0) &", "learning = ((wanted < 0) &", FAST
    ),
    _mutant("gradient-of-cut", "steering/learning.py", " & (active.value + wanted > 0))", ")", FAST),
    _mutant(
        "gradient-sign",
        "steering/learning.py",
        "torch.where(entries > 0, up, down)",
        "torch.where(entries > 0, down, up)",
        FAST,
    ),
    _mutant(
        "gradient-multiplier",
        "steering/learning.py",
        "gradients[0].float() * multiplier[:, None]",
        "gradients[0].float()",
        FAST,
    ),
    _mutant(
        "folded-constant", "steering/folded.py", "read = (wanted < 0).nonzero()", "read = (wanted > 0).nonzero()", FAST
    ),
    _mutant("folded-stale-code", "steering/folded.py", "return torch.equal(self.code, code)", "return True", FAST),
    _mutant(
        "folded-stale-multiplier",
        "steering/folded.py",
        "(_one(multiplier), sae, like.dtype",
        "(self.multiplier, sae, like.dtype",
        FAST,
    ),
    _mutant("reach", "steering/reach.py", "code[part].abs() *", "code[part] *", "tests/methods/test_prune.py"),
    _mutant("jumprelu", "sae/weights.py", "pre.relu() * (pre > self.threshold)", "pre.relu()", FORMULA),
    _mutant(
        "not-detached",
        "tuner/layer.py",
        "            h = h.detach()\n",
        "            pass\n",
        "tests/tuner/test_dense.py",
        "tests/tuner/test_adapter.py",
    ),
    _mutant(
        "mask-ignored",
        "tuner/layer.py",
        "shift = shift.masked_fill(~mask[..., None], 0)",
        "pass",
        "tests/tuner/test_positions.py",
    ),
    _mutant(
        "merged-steers-twice",
        "tuner/layer.py",
        "if self.disable_adapters or self.merged:",
        "if self.disable_adapters:",
        "tests/tuner/test_merging.py",
    ),
    _mutant(
        "disabled-steers", "tuner/layer.py", "if self.disable_adapters or self.merged:", "if self.merged:", CONTRACT
    ),
    _mutant(
        "every-layer-lowest",
        "tuner/layer.py",
        "return lowest is None or self.index <= lowest.index",
        "return True",
        FAST,
        "tests/tuner/test_adapter.py",
    ),
    _mutant(
        "position-shifted",
        "tuner/positions.py",
        "torch.where(scored, place - begun, place - ends)",
        "torch.where(scored, place - begun + 1, place - ends)",
        "tests/tuner/test_positions.py",
    ),
    _mutant(
        "prompt-off-by-one",
        "tuner/positions.py",
        "index >= prompt_length",
        "index > prompt_length",
        "tests/tuner/test_positions.py",
    ),
    _mutant(
        "beams-not-repeated",
        "tuner/call.py",
        "multipliers.repeat_interleave(",
        "multipliers.repeat(",
        CONTRACT,
    ),
    _mutant(
        "merge-any-architecture",
        "tuner/merging.py",
        "min(0.01, 1000 * eps) * shift.norm()",
        "100 * shift.norm()",
        "tests/tuner/test_merging.py",
    ),
    _mutant(
        "merge-scaled-sae",
        "tuner/merging.py",
        'if sae.normalization != "none":',
        "if False:",
        "tests/tuner/test_merging.py",
    ),
    _mutant(
        "multiplier-left-behind",
        "tuner/adapters.py",
        "        layer.multiplier.update(",
        "        dict().update(",
        "tests/tuner/test_multiplier.py",
    ),
    _mutant(
        "prompts-leak",
        "scoring/checks.py",
        "if leak > 1e-5 or not same(shared, expected, is_exact):",
        "if False:",
        CACHE,
        SWEEP,
    ),
    _mutant("window-ignored", "scoring/checks.py", "if longest > attention_window(base):", "if False:", CACHE),
    _mutant(
        "answers-see-each-other",
        "scoring/packing.py",
        "sees &= (part_of[:, None, :] == 0) | (part_of[:, None, :] == part_of[:, :, None])",
        "sees &= True",
        "tests/scoring/test_packing.py",
        CACHE,
    ),
    _mutant(
        "positions-not-shared",
        "scoring/packing.py",
        "torch.cat([torch.arange(prompt), *answers])",
        "torch.arange(sizes[pair])",
        CACHE,
    ),
    _mutant(
        "noise-ignored",
        "scoring/checks.py",
        "if not torch.allclose(trained, expected, rtol=1e-4, atol=1e-4):",
        "if False:",
        "tests/trainer/test_cache_refusals.py",
    ),
    _mutant(
        "stale-lower-half", "scoring/scorer.py", "if not _equal(relevant, self._inputs):", "if not self._inputs:", SWEEP
    ),
    _mutant(
        "damaged-cache",
        "scoring/store.py",
        "if self._hash(part, tensors) != (file.metadata() or {}).get(_HASH):",
        "if False:",
        "tests/trainer/test_cache_on_disk.py",
    ),
    _mutant(
        "start-steers-everything",
        "scoring/lm_head.py",
        "for name in layer.enabled_adapters",
        "for name in layer.steering_adapters",
        "tests/trainer/test_sparsity.py",
    ),
    _mutant(
        "direction-of-examples",
        "trainer/objective.py",
        "drawn[-pairs:]",
        "drawn[:pairs]",
        "tests/trainer/test_objective.py",
    ),
    _mutant(
        "pairs-not-swapped",
        "trainer/objective.py",
        "swap = directions.cpu() < 0",
        "swap = directions.cpu() > 0",
        "tests/trainer/test_objective.py",
        TRAINER,
    ),
    _mutant(
        "margin-reference",
        "trainer/objective.py",
        "return (chosen - ref_chosen) - (rejected - ref_rejected)",
        "return chosen - rejected",
        TRAINER,
    ),
    _mutant(
        "unit-not-applied",
        "trainer/units.py",
        '"lr": group["lr"] * unit',
        '"lr": group["lr"]',
        "tests/trainer/test_units.py",
    ),
    _mutant(
        "loss-not-finite",
        "trainer/trainer.py",
        "if losses.isfinite().all():",
        "if True:",
        "tests/trainer/test_bad_input.py",
    ),
)


def outcome(mutant: Mutant, full: bool) -> str:
    """Runs the tests of a mutant: "killed", "survived", or "not applicable"."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
            else:
                shutil.copy(source, tree / name)
        file = tree / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            return "not applicable"
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            command + (["--full"] if full else []), cwd=tree, env=environment, capture_output=True, check=False
        )
    return "survived" if result.returncode == 0 else "killed"


def main(arguments: list[str]) -> int:
    """Runs the mutants that are named, or all."""
    full, names = "--full" in arguments, [name for name in arguments if not name.startswith("-")]
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(2) as pool:
        for mutant, result in zip(chosen, pool.map(lambda one: outcome(one, full), chosen), strict=True):
            found.setdefault(result, []).append(mutant.name)
            print(f"{result:15}{mutant.name:28}{mutant.file}", flush=True)
    print(", ".join(f"{len(names)} {result}" for result, names in found.items()))
    return int(set(found) != {"killed"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
