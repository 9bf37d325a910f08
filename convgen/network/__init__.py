"""Whole networks: a model's graph, its plan in memory, and one library that runs it."""
