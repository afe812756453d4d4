"""The list of small faults that `make mutants` applies."""

from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_faults_still_have_a_place(mutant):
    """Code that moved would leave its fault untested."""
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert all((ROOT / file).is_file() for file in mutant.tests)
