"""The lm-eval bridge and the task folder, offline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

import datasets
import torch
import transformers
from lm_eval.tasks import TaskManager
from lm_eval.tasks.fda import task as fda

from whimbrel.cli import main
from whimbrel.config import load_config
from whimbrel.data.synthetic import IGNORE
from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError, DataError
from whimbrel.evals.score import score
from whimbrel.evals.tasks import TASKS, make_task
from whimbrel.infer.load import load_model, load_tokenizer
from whimbrel.integrations.hf import convert_checkpoint
from whimbrel.integrations.lm_eval import TASK_FOLDER, harness
from whimbrel.integrations.lm_eval.copies import copies_at
from whimbrel.integrations.lm_eval.dataset import choices, documents, process_results
from whimbrel.integrations.lm_eval.essays import essays_from
from whimbrel.integrations.lm_eval.harness import evaluate_folder
from whimbrel.integrations.lm_eval.words import SCRIPTS, symbols_of
from whimbrel.testing.tiny import tiny_overrides
from whimbrel.training import train

SIZES = {"lengths": (64, 80), "num_samples": 6, "seed": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(load_config("demo", tiny_overrides(corpus)), run_dir=folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def converted(run, tmp_path_factory):
    return convert_checkpoint(run, tmp_path_factory.mktemp("hf") / "model").out


@pytest.mark.parametrize("words", SCRIPTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_reader_of_the_answers_scores_one_and_a_guess_chance(task: str, words: str) -> None:
    docs = documents(task=task, max_seq_lengths=(64,), num_samples=200, words=words)["test"]
    guesses = np.random.default_rng(0).random((200, 64))
    best, guessed = [], []
    for doc, guess in zip(docs, guesses, strict=True):
        assert len(set(doc["choices"])) == len(choices(doc)) == 64
        best.append(process_results(doc, [(float(i in doc["answers"]), False) for i in range(64)])["accuracy"])
        guessed.append(process_results(doc, [(value, False) for value in guess])["accuracy"])
    assert set(best) == {1.0}
    chance = len(docs[0]["answers"]) / 64
    assert abs(np.mean(guessed) - chance) < 4 * (chance / 200) ** 0.5


def test_the_text_of_a_document_says_what_its_sequence_says() -> None:
    """The needle's value follows its key in the text, in both scripts."""
    for words, script in SCRIPTS.items():
        for doc in documents(task="needle_multi_key", max_seq_lengths=(60,), num_samples=5, words=words)["test"]:
            parts = doc["prompt"].split(" ") if script.space else doc["prompt"].replace("|><|", "|> <|")
            text = " ".join(parts) if script.space else parts
            answer = doc["choices"][doc["answers"][0]]
            key = text[text.rindex("<") :] if not script.space else text.split(" ")[-1]
            assert f"{key} {answer}" in text


@pytest.mark.parametrize("words", SCRIPTS)
def test_words_are_different(words: str) -> None:
    script = SCRIPTS[words]
    assert len(set(script.words)) == len(script.words)
    assert script.words[128] in ("and", "0"), "64 keys and 64 values come first"
    assert len(symbols_of(script).values) == len(symbols_of(script).keys) == 64


def test_it_scores_as_our_own_evaluation_does(run, converted) -> None:
    """Tasks with one question a sequence: the same sequences, as tokens here and as text there."""
    tasks = ("needle_multi_key", "needle_multi_value", "variable_tracking", "list_recall", "common_words")
    found = evaluate_folder(converted, [f"whimbrel_{task}" for task in tasks], **SIZES)["results"]
    model, tokenizer = load_model(run), load_tokenizer(run)
    digits = np.concatenate([tokenizer.encode(digit) for digit in "0123456789"])
    assert len(digits) == 10
    places = np.concatenate([tokenizer.symbols.keys, tokenizer.symbols.values, digits])
    generic = symbols_of(SCRIPTS["reserved"])
    symbols = Symbols(*(places[ids] for ids in generic))
    for task in tasks:
        for length in SIZES["lengths"]:
            made = make_task(task, seed=3, batch=6, length=length, symbols=generic)
            answers = np.where(made.answers == IGNORE, IGNORE, places[made.answers])
            want = score(model, places[made.tokens], answers, symbols).interval().value
            assert found[f"whimbrel_{task}"][f"accuracy_{length},none"] == pytest.approx(want)


def test_prompts_keep_their_first_token(converted) -> None:
    """Longer than the model was trained on, and yet not cut from the left."""
    model = transformers.AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.max_position_embeddings == 64
    seen: list[int] = []
    forward = type(model).forward

    def note(self, input_ids=None, **kwargs):
        seen.append(input_ids.shape[1])
        return forward(self, input_ids, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", note)
        evaluate_folder(converted, ["whimbrel_list_recall"], lengths=(101,), num_samples=2)
    # Two tokens are the question, and lm-eval gives a model everything before the last.
    assert max(seen) == 101
    assert len(seen) == 2, "one forward pass a document"


def test_the_command_takes_runs_and_folders_of_transformers(run, converted, capsys) -> None:
    options = ["--lengths", "64", "--num-sequences", "3", "--seed", "3", "--json"]
    found = []
    for folder in (run, converted):
        assert main(["eval", str(folder), "--lm-eval", "whimbrel_copying", "whimbrel_list_recall", *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["n-samples"]["whimbrel_copying"] == {"original": 3, "effective": 3}
    assert main(["eval", str(run), "--lm-eval", "whimbrel", *options[:-1], "--limit", "2"]) == 0
    text = capsys.readouterr().out
    for part in ("standard error", "accuracy_64", "Mean and worst task", *(f"whimbrel_{task}" for task in TASKS)):
        assert part in text


def _bytes_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="!", pad_token="!")


def test_any_model_of_transformers_gets_words(tmp_path, monkeypatch, capfd) -> None:
    """A tokenizer without reserved tokens: choices of several tokens, behind a space; git is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    tokenizer = _bytes_tokenizer()
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=16, intermediate_size=16, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = evaluate_folder(tmp_path, ["whimbrel_needle_single"], lengths=(16,), num_samples=2)
    assert 0 <= found["results"]["whimbrel_needle_single"]["accuracy,none"] <= 1
    assert "git" not in capfd.readouterr().err


def test_the_task_folder_holds_every_task() -> None:
    assert {path.stem for path in TASK_FOLDER.glob("whimbrel_*.yaml")} == {f"whimbrel_{task}" for task in TASKS}
    group = (TASK_FOLDER / "whimbrel.yaml").read_text()
    assert all(f"  - whimbrel_{task}\n" in group for task in TASKS)


def test_essays_of_ones_own_are_the_haystack(tmp_path, monkeypatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_args, **_kwargs: False)  # lm-eval tries as it is imported
    from lm_eval.tasks.ruler import niah_utils

    def refuse(*_args, **_kwargs):
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    make = niah_utils.generate_samples
    monkeypatch.setattr(niah_utils, "generate_samples", lambda *a, **given: make(*a, **given | {"num_samples": 20}))
    _bytes_tokenizer().save_pretrained(tmp_path)
    sentences = [f"The {number} birds of the north flew over a quiet sea." for number in range(900)]
    text = tmp_path / "essays.txt"
    text.write_text(" ".join(sentences))
    sizes = {"tokenizer": str(tmp_path), "max_seq_lengths": [4000]}
    with essays_from(text, len, 4000):
        docs = niah_utils.niah_multivalue(**sizes)["test"]
    assert len(docs) == 20
    for doc in docs:
        assert sentences[0] in doc["input"]
        assert len(doc["outputs"]) == 4
        assert all(f"is: {value}." in doc["input"] for value in doc["outputs"])
        parts = doc["input"].split("One of the special magic")
        assert len(parts) == 5
        # lm-eval cuts the text between two words: a needle behind all of it may follow half a sentence.
        assert all(part.rstrip()[-1] == "." for part in parts[:-2][1:]), "needles lie between sentences"
    assert datasets.load_dataset is refuse
    with pytest.raises(ConnectionError):
        niah_utils.niah_multivalue(**sizes)
    with (
        pytest.raises(DataError, match=r"essays.txt have [\d,]+ tokens, a prompt takes up to 99,999; give more text"),
        essays_from(text, len, 99_999),
    ):
        pass


ROWS = [{"text": f"The device weighs {n} grams. Weight:", "value": f"{n} grams"} for n in range(5)]
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The sea was calm.",
                    "qas": [{"question": "What was calm?", "is_impossible": False, "answers": [{"text": "The sea"}]}],
                }
            ]
        }
    ]
}


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder"])
def test_a_copy_stands_in_for_a_data_set(form, tmp_path) -> None:
    from lm_eval.tasks.fda.task import FDA
    from lm_eval.tasks.squad_completion.task import SQUADCompletion
    from lm_eval.tasks.swde.task import SWDE

    path = tmp_path / ("data" if form == "folder" else f"data.{form}")
    if form == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        path.mkdir() if form == "folder" else None
        lines = "\n".join(map(json.dumps, ROWS)) + "\n"
        (path / "validation.jsonl" if form == "folder" else path).write_text(lines)
    for task in (FDA, SQUADCompletion, SWDE):
        with copies_at({task.DATASET_PATH: path}):
            made = task()
        assert [(made.doc_to_text(doc), made.doc_to_target(doc)) for doc in made.validation_docs()] == [
            (row["text"], row["value"]) for row in ROWS
        ]


def test_a_copy_stands_in_for_a_download(tmp_path, monkeypatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_args, **_kwargs: False)  # lm-eval tries as it is imported
    from lm_eval.tasks.ruler import qa_utils

    def refuse(*_args, **_kwargs):
        raise ConnectionError("no network here")

    monkeypatch.setattr(qa_utils, "download_json", refuse)
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(SQUAD))
    with copies_at({"dev-v2.0.json": path}):
        questions, texts = qa_utils.read_squad()
        with pytest.raises(ConnectionError):
            qa_utils.read_hotpotqa()
    assert (questions[0]["query"], questions[0]["outputs"], texts) == (
        "What was calm?",
        ["The sea"],
        ["The sea was calm."],
    )
    with pytest.raises(ConnectionError):
        qa_utils.read_squad()


def test_the_command_takes_copies(run, tmp_path, capsys, monkeypatch) -> None:
    def of_one_task(**given):  # the index of all tasks takes seconds to read, and this is called often
        return TaskManager(**given | {"include_path": str(Path(fda.__file__).parent), "include_defaults": False})

    monkeypatch.setattr(harness, "TaskManager", of_one_task)
    path = tmp_path / "fda.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    call = ["eval", str(run), "--lm-eval", "fda", "--lengths", "64", "--limit", "2", "--json", "--datasets"]
    assert main([*call, f"hazyresearch/based-fda={path}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n-samples"]["fda"] == {"original": 5, "effective": 2}
    assert 0 <= found["results"]["fda"]["contains,none"] <= 1
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": 1}\n{')
    for given, message in (
        ("fda.jsonl", "--datasets fda.jsonl is not understood; write NAME=FILE"),
        (f"hazyresearch/based-fda={tmp_path / 'none'}", "given as the copy of hazyresearch/based-fda, does not exist"),
        (f"hazyresearch/based-fda={broken}", "broken.jsonl, line 2 is not valid JSON"),
    ):
        assert main([*call, given]) != 0
        assert message in capsys.readouterr().err


def test_a_copy_that_nothing_asks_for_is_named(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    with (
        pytest.raises(ConfigError, match="no task asked for the data set hazyresearch/fda"),
        copies_at({"hazyresearch/fda": path}),
    ):
        pass


def test_mistakes_are_named(run, converted, capsys) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown task 'whimbrel_copyng' of lm-eval; did you mean 'whimbrel_copying'\?"
    ):
        evaluate_folder(converted, ["whimbrel_copyng"])
    with pytest.raises(ConfigError, match=r"words = 'englsh' is not allowed; did you mean 'english'\?; use one of"):
        documents(task="copying", words="englsh")
    for arguments, message in (
        (["--lm-eval", "whimbrel", "--methods", "window"], "--methods is not used with --lm-eval; leave it out"),
        (["--limit", "3"], "--limit belongs to --lm-eval; use --num-sequences"),
        (["--essays", "text"], "--essays belongs to --lm-eval; leave it out"),
        (["--datasets", "a=b"], "--datasets belongs to --lm-eval; leave it out"),
    ):
        assert main(["eval", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err
