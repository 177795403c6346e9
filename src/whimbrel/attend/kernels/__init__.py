"""Triton kernel of attention over a plan. Its modules import Triton, so they are imported only to be run."""
