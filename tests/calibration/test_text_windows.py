"""Random windows into long texts."""

import itertools

import pytest
import torch
from compressor_calibration.text_windows import text_windows


def words(count: int, *, longest: int) -> str:
    """Words that number themselves, short ones in the first half and long ones in the second."""
    return " ".join(f"{i}" if i < count // 2 else f"{i}".ljust(longest, "x") for i in range(count))


class WordTokenizer:
    """One token a word, its number; what is no whole word is no number. Counts characters."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str) -> list[int]:
        self.characters += len(text)
        return [int(word.rstrip("x") or -1) for word in text.split()]


@pytest.mark.parametrize("longest", [6, 50])
@pytest.mark.parametrize("seed", range(4))
def test_windows_are_runs_of_whole_words_that_do_not_overlap(seed, longest):
    encode = WordTokenizer()
    rows = text_windows(encode, words(20_000, longest=longest), samples=8, length=20, seed=seed)
    assert rows is not None and rows.shape == (8, 20) and rows.dtype == torch.int64
    assert (rows.diff(dim=1) == 1).all()
    starts = rows[:, 0].sort().values.tolist()
    assert all(b - a >= 20 for a, b in itertools.pairwise(starts))


def test_only_the_windows_and_a_probe_are_tokenized():
    encode = WordTokenizer()
    text = words(200_000, longest=6)
    text_windows(encode, text, samples=8, length=20, seed=0)
    assert encode.characters < 30_000 < len(text)


def test_places_follow_the_seed():
    text = words(20_000, longest=6)
    one, again, other = (
        text_windows(WordTokenizer(), text, samples=8, length=20, seed=s) for s in (1, 1, 2)
    )
    assert one is not None and again is not None and other is not None
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("text", ["", "1 2 3 4", words(160, longest=4)])
def test_a_short_text_is_left_to_those_who_tokenize_all_of_it(text):
    assert text_windows(WordTokenizer(), text, samples=8, length=20, seed=0) is None
