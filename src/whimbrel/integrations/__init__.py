"""Thin adapters to other engines, one folder each, behind an extra of the same name."""
