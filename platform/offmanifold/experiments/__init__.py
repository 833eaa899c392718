"""Experiments: one file answers one question of the papers."""
