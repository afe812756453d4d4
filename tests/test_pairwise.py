from itertools import combinations, product

import pytest
from pairwise import cover


@pytest.mark.parametrize("sizes", [(4, 7, 5), (3, 3, 3, 3), (2, 5, 1), (4, 4, 2, 2, 3)])
def test_every_pair_of_values_is_covered(sizes):
    rows = cover(sizes, "a test")
    for first, second in combinations(range(len(sizes)), 2):
        assert {(row[first], row[second]) for row in rows} == set(product(range(sizes[first]), range(sizes[second])))
    assert len(rows) < len(list(product(*map(range, sizes)))) or 1 in sizes


@pytest.mark.parametrize("sizes", [(4, 7), (3,), (2, 2)])
def test_two_axes_see_each_value(sizes):
    rows = cover(sizes, "a test")
    for axis, size in enumerate(sizes):
        assert {row[axis] for row in rows} == set(range(size))
    assert len(rows) == max(sizes)


def test_tests_see_different_combinations_and_the_same_ones_each_time():
    assert cover((4, 7), "a test") == cover((4, 7), "a test")
    seen = {row for number in range(30) for row in cover((4, 7), f"test {number}")}
    assert seen == set(product(range(4), range(7)))


def test_the_marker_covers_its_axes_and_full_runs_all(pytester):
    pytester.makeconftest('pytest_plugins = ["combining"]')
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.combine(kind={"small": 1, "large": 2}, name=["a", "b", "c"])

        @pytest.fixture
        def both(kind, name):
            return kind, name

        def test_both(both, kind):
            assert both[0] == kind

        @pytest.mark.combine(name=["d"], third=[True, False])
        def test_three(kind, name, third):
            assert name == "d"

        def test_none():
            pass

        @pytest.mark.full
        def test_long():
            pass
        """
    )
    fast = pytester.runpytest_inprocess("-v")
    fast.assert_outcomes(passed=3 + 4 + 1, deselected=1)
    fast.stdout.fnmatch_lines(["*test_both[[]large-?[]]*"])
    pytester.runpytest_inprocess("--full").assert_outcomes(passed=6 + 4 + 1 + 1)
