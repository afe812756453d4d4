"""The published method, written plainly from its equations: the oracle of the tests."""
