"""Triton kernels of the recurrences. These modules import Triton, so they are themselves imported only to be run."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
"""Whether Triton is installed; without it the kernels cannot run and nothing else changes."""
