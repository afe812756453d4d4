import subprocess
import sys
from pathlib import Path

from support_table import TABLE


def test_the_support_table_is_that_of_the_tests():
    code = "import sys, support_table; sys.stdout.write(support_table.support_table())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert run.stdout == TABLE.read_text(), "docs/support.md is out of date: run make support"
