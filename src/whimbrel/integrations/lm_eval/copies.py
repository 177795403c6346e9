"""Files of one's own in place of what lm-eval's tasks would fetch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from whimbrel.errors import ConfigError, DataError

_SPLITS = ("train", "validation", "test")
_SUFFIXES = (".jsonl", ".parquet")


@contextmanager
def datasets_from(made: Mapping[str, Callable[[], Any]]) -> Iterator[None]:
    """Inside, `datasets.load_dataset` of one of these names gives what is made here: splits by name, or one split."""
    import datasets

    load = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        return made[path]() if path in made else load(path, *args, **kwargs)

    with patch.object(datasets, "load_dataset", load_dataset):
        yield


@contextmanager
def copies_at(files: Mapping[str, str | Path]) -> Iterator[None]:
    """Inside, lm-eval's tasks read these files in place of the data sets and downloads of these names.

    files: the name of a data set, as a task gives it to `datasets.load_dataset` -> a .jsonl or .parquet file, which
    serves every split, or a folder with a file for each split, such as validation.jsonl; or the last part of the
    address of RULER's questions (`dev-v2.0.json`, `hotpot_dev_distractor_v1.json`) -> that file.
    Raises DataError for a file that is missing or cannot be read, ConfigError for a name that nothing asked for.
    """
    paths = {name: Path(path) for name, path in files.items()}
    for name, path in paths.items():
        if not path.exists():
            raise DataError(f"{path}, given as the copy of {name}, does not exist; name a file or folder that does")
    asked: set[str] = set()

    def take(name: str, read: Callable[[Path], Any]) -> Any:
        asked.add(name)
        return read(paths[name])

    with ExitStack() as stack:
        stack.enter_context(datasets_from({name: partial(take, name, _splits) for name in paths}))
        if any(name.endswith(".json") for name in paths):
            stack.enter_context(_downloads(lambda name: take(name, _json) if name in paths else None))
        yield
    for name in paths:
        if name not in asked:
            raise ConfigError(f"no task asked for the data set {name}; name it as the task does, or leave it out")


@contextmanager
def _downloads(find: Callable[[str], Any]) -> Iterator[None]:
    """RULER's questions are downloads, kept by lm-eval for the life of the process."""
    from lm_eval.tasks.ruler import qa_utils

    fetch = qa_utils.download_json

    def download_json(url: str) -> Any:
        found = find(url.rpartition("/")[2])
        return fetch(url) if found is None else found

    def forget() -> None:
        for function in (qa_utils.read_squad, qa_utils.read_hotpotqa):
            function.cache_clear()

    forget()
    try:
        with patch.object(qa_utils, "download_json", download_json):
            yield
    finally:
        forget()


def _splits(path: Path) -> Any:
    import datasets

    if path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES}
        if not files:
            raise DataError(f"{path} holds no .jsonl or .parquet file; name them by split, such as validation.jsonl")
        return datasets.DatasetDict({split: _read(file) for split, file in files.items()})
    return datasets.DatasetDict(dict.fromkeys(_SPLITS, _read(path)))


def _read(path: Path) -> Any:
    import datasets

    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path} is no copy of a data set; give a .jsonl or .parquet file, or a folder of them")
    if path.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            return datasets.Dataset(parquet.read_table(path))
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet: {error}") from error
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_parsed(line, f"{path}, line {number}"))
    return datasets.Dataset.from_list(rows)


def _json(path: Path) -> Any:
    return _parsed(path.read_text(encoding="utf-8"), str(path))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
