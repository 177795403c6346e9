"""The `whimbrel` command. Each verb is a module that is imported when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from whimbrel import __version__
from whimbrel.errors import ConfigError, WhimbrelError, nearest

VERBS = {
    "demo": "train, average, judge and prefill a small model; writes a report",
    "data": "turn text into token shards",
    "train": "train a recipe or a TOML file; goes on where the run folder left off",
    "merge": "average checkpoints",
    "convert": "write a model for transformers, or take one from there (extra hf)",
    "eval": "bits per byte, recall and needle tasks of a checkpoint",
    "generate": "continue a prompt, prefilled as the model says or sparsely",
    "bench": "time an operation against its rivals",
    "show": "settings and memory of a recipe, layers of a checkpoint, all kinds",
}
INTERRUPTED = 130
OS_ERRORS = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name another path, or one that you may read and write"),
}
"""What to do about errors of the system that are not ours; others keep their traceback."""
SPINS = "1000"
"""Turns that a thread of an operator waits busily for the others before it sleeps: GNU OpenMP's own number once it sees
more threads than cores. Its usual 300,000 keep a core from what else runs there, the thread waited for included."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 success, 2 usage or configuration, 1 and above other errors."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported, which a verb does
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not debug:
        warnings.formatwarning = _one_line_warning
    try:
        return _dispatch(args)
    except WhimbrelError as error:
        if debug:
            raise
        return _complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        advice = OS_ERRORS.get(error.errno or 0)
        if debug or advice is None:
            raise
        return _complain(f"{error.filename or 'the disk'}: {error.strerror}; {advice}", 1)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"whimbrel {__version__}")
        return 0
    verb, *rest = args
    if verb not in VERBS:
        raise ConfigError(f"unknown command '{verb}'{nearest(verb, VERBS)}; use one of {', '.join(VERBS)}")
    return importlib.import_module(f"whimbrel.cli.{verb}").main(rest) or 0


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: whimbrel COMMAND [OPTIONS]\n\n"
        "Train language models on the memory you have and run them over long contexts.\n\n"
        f"commands:\n{verbs}\n\n"
        "whimbrel COMMAND --help tells a command's options;\n--debug shows the traceback of an error."
    )


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"whimbrel: warning: {' '.join(str(message).split())}\n"


def _complain(message: str, status: int) -> int:
    print(f"whimbrel: error: {' '.join(message.split())}", file=sys.stderr)
    return status
