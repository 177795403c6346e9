"""A test waits for room on the GPU, and is skipped where there can be none."""

from __future__ import annotations

import pytest

from whimbrel.testing.gpu import need_memory

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """What the GPU answers, one (free, total) a question, the last one for ever."""
    answers = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: answers.pop(0) if len(answers) > 1 else answers[0])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return answers


def test_waits_for_what_others_give_back(gpu):
    gpu += [(1 * GIB, 80 * GIB), (19 * GIB, 80 * GIB), (20 * GIB, 80 * GIB)]
    need_memory(20 * GIB)
    assert gpu == [(20 * GIB, 80 * GIB)]


def test_memory_that_stays_taken_fails_and_does_not_skip(gpu):
    gpu += [(19 * GIB, 80 * GIB)]
    with pytest.raises(pytest.fail.Exception, match=r"^needs 20 GiB on a GPU, 19 are free: run it alone, with -n 0$"):
        need_memory(20 * GIB, seconds=0.0)


def test_a_card_that_is_too_small_skips(gpu):
    gpu += [(10 * GIB, 16 * GIB)]
    with pytest.raises(pytest.skip.Exception, match=r"^needs 20 GiB on a GPU, this one has 16 in all$"):
        need_memory(20 * GIB)
