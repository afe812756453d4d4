"""Adapters on disk: codes, parts of SAEs, whole folders, and cards."""
