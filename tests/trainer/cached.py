"""Datasets for the tests of training on cached activations."""

from datasets import Dataset
from tiny import preference_rows

MANY = Dataset.from_list(preference_rows(16))
HELD_OUT = Dataset.from_list(preference_rows(5, seed=5))
