"""lm-eval over a model of transformers in a folder, without a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import transformers
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from whimbrel.data.tokenizer import KEY_TOKENS, VALUE_TOKENS
from whimbrel.errors import ConfigError, DataError, nearest
from whimbrel.integrations.lm_eval import TASK_FOLDER
from whimbrel.integrations.lm_eval.copies import copies_at
from whimbrel.integrations.lm_eval.essays import essays_from

_OWN = "whimbrel"
LONGEST_WORD = 16
"""Tokens that one word of a prompt may take, in a tokenizer of bytes; room costs nothing."""


def evaluate_folder(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    lengths: Sequence[int] = (256, 1024),
    num_samples: int = 64,
    seed: int = 1234,
    limit: int | None = None,
    device: str = "cpu",
    max_length: int | None = None,
    batch_size: int = 1,
    essays: str | Path | None = None,
    copies: Mapping[str, str | Path] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """lm-eval's results of the model and tokenizer in `folder`: `results`, `groups`, `n-samples`, `versions`.

    folder: for `from_pretrained`; its model type must be known, so import `whimbrel.integrations.hf` for Whimbrel's.
    tasks: names or groups of lm-eval and of TASK_FOLDER. lengths: of generated prompts, RULER's among them, in tokens,
    for RULER by the model's tokenizer. num_samples, seed: of TASK_FOLDER's. limit: documents of each task, at most.
    max_length: most tokens of a prompt, beyond which lm-eval cuts it from the left; LONGEST_WORD times the longest of
    `lengths`, or what the model names, whichever is more. essays: a text that stands in for Paul Graham's in
    RULER's tasks (see `whimbrel.integrations.lm_eval.essays`). copies: name of a data set -> file in its place (see
    `whimbrel.integrations.lm_eval.copies`). metadata: further settings of the tasks.

    Whimbrel's tasks are written in reserved tokens where the tokenizer has them, otherwise in English words. Raises
    ConfigError for an unknown task or a copy that no task asks for, DataError for a task whose data is not on this
    machine, for a copy that cannot be read, or for too few essays.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    # Reserved tokens that are spelt out in a prompt are meant.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
    known = tokenizer.get_vocab()
    reserved = all(token in known for token in (*KEY_TOKENS, *VALUE_TOKENS))
    settings = {
        "tokenizer": str(folder),
        "max_seq_lengths": list(lengths),
        "num_samples": num_samples,
        "seed": seed,
        "words": "reserved" if reserved else "english",
        **(metadata or {}),
    }
    manager = _manager(tasks, settings)
    named = getattr(model.config, "max_position_embeddings", None) or 0
    room = max_length or max(named, LONGEST_WORD * max(lengths))
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, max_length=room, batch_size=batch_size)
    with ExitStack() as stack:
        if essays is not None:
            stack.enter_context(essays_from(essays, lambda text: len(tokenizer(text).input_ids), max(lengths)))
        if copies:
            stack.enter_context(copies_at(copies))
        found = _evaluate(wrapped, tasks, manager, seed, limit)
    return {name: found[name] for name in ("results", "groups", "n-samples", "versions") if name in found}


def _evaluate(
    model: HFLM, tasks: Sequence[str], manager: TaskManager, seed: int, limit: int | None
) -> Mapping[str, Any]:
    try:
        with _nothing_about_the_machine():
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
            )
    except (ConnectionError, OSError, LookupError) as error:
        raise DataError(
            f"lm-eval cannot load what one of the tasks {', '.join(tasks)} needs: {_first_line(error)}; leave that "
            "task out, give a copy with --datasets NAME=FILE, or load it once with a network and HF_HUB_OFFLINE=0"
        ) from error
    assert found is not None
    return found


@contextmanager
def _nothing_about_the_machine() -> Iterator[None]:
    """lm-eval asks git for a commit, which complains on the terminal outside of a checkout, and takes seconds to
    collect what the machine is. Nobody reads either here."""
    with (
        patch.object(evaluator, "get_git_commit_hash", lambda: None),
        patch.object(evaluator, "add_env_info", lambda results: None),
    ):
        yield


def _manager(tasks: Sequence[str], settings: Mapping[str, Any]) -> TaskManager:
    """The index of lm-eval's tasks takes seconds to read, so it is left out where nothing is asked of it."""
    own = all(task.partition("_")[0] == _OWN for task in tasks)
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=not own, metadata=dict(settings))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ConfigError(f"unknown task '{task}' of lm-eval{nearest(task, manager.all_tasks)}")
    return manager


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
