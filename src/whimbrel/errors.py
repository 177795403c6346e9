"""Errors that users see. Each message is one line: name, value, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WhimbrelError(Exception):
    """Base of every error that Whimbrel raises on purpose; the command exits with `exit_status`."""

    exit_status = 1


class ConfigError(WhimbrelError):
    """A setting or an argument is wrong: the user can mend it without touching data."""

    exit_status = 2


class DataError(WhimbrelError):
    """A corpus, tokenizer or token shard is missing or damaged."""

    exit_status = 3


class CheckpointError(WhimbrelError):
    """A checkpoint is missing, incomplete, damaged, or does not fit."""

    exit_status = 4


class TrainingError(WhimbrelError):
    """Training cannot go on, for example because the loss is not finite."""

    exit_status = 5


class UnsupportedError(WhimbrelError):
    """The request is well formed, but this build, device or method cannot serve it."""

    exit_status = 6


class MissingExtraError(UnsupportedError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The hint "; did you mean 'x'?" for the allowed name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
