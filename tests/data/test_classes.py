"""Class names -> a network's class numbers: by name, never by position among the folders at hand."""

from __future__ import annotations

import numpy as np
import pytest

from guided_diffusion.data.classes import number_of, renumber
from guided_diffusion.data.listing import Records

DIGITS = tuple("0123456789")


def records(words: str, source: str = "folders", names: tuple[str, ...] | None = None) -> Records:
    """One picture per word; classes in sorted order, as a listing makes them, unless `names` says which."""
    each = words.split()
    own = tuple(sorted(set(each))) if names is None else names
    labels = np.array([own.index(word) for word in each], dtype=np.int64)
    return Records(tuple(f"{k}.png" for k in range(len(each))), labels, own, source, root="DATA")


def numbered(numbers: list[int]) -> Records:
    """A table of class numbers: a listing calls class k by its number."""
    labels = np.array(numbers, dtype=np.int64)
    return Records(("a",) * len(numbers), labels, tuple(map(str, range(max(numbers) + 1))), "labels.csv", root="DATA")


@pytest.mark.parametrize(
    ("found", "names", "expected"),
    [
        (records("7 8 9 7"), DIGITS, [7, 8, 9, 7]),  # a part of the classes
        (records("b a"), ("a", "b", "c"), [1, 0]),
        (records("cat dog", "prefix"), ("ant", "cat", "cow", "dog"), [1, 3]),
        (records("10 9"), ("10", "9", "8"), [0, 1]),  # sorted as words, in a network that was given another order
        (records("dog cat", "labels.csv"), ("dog", "ox", "cat"), [0, 2]),  # a table of names
        (numbered([7, 9, 8]), DIGITS, [7, 9, 8]),
        (numbered([2, 0]), ("cat", "dog", "ox"), [2, 0]),  # a table of numbers says the numbers
        (numbered([8, 7]), ("7", "8", "9"), [1, 0]),  # numbers that are names
    ],
)
def test_classes_go_by_name(found: Records, names: tuple[str, ...], expected: list[int]) -> None:
    mapped, _ = renumber(found, names, len(names), "NET")
    assert mapped.labels is not None and mapped.labels.tolist() == expected
    assert mapped.class_names == names and mapped.paths == found.paths


@pytest.mark.parametrize(
    ("found", "names", "unknown"),
    [
        (records("0 1 00new"), ("0", "1", "2"), "00new"),  # renamed
        (records("ant bee cat"), ("ant", "cat"), "bee"),  # added
        (records("0 1"), ("cat", "dog"), "0, 1"),  # folders called by numbers are names, too
        (records("Cat dog"), ("cat", "dog"), "Cat"),
        (numbered([0, 1]), ("7", "8", "9"), "0, 1"),  # number 0 or the class called 0?
        (numbered([3]), ("cat", "dog"), "3"),
    ],
)
def test_an_unknown_class_is_refused_by_name(found: Records, names: tuple[str, ...], unknown: str) -> None:
    with pytest.raises(ValueError, match=rf"DATA has the classes {unknown} \(\d\), which NET does not know"):
        renumber(found, names, len(names), "NET")


@pytest.mark.parametrize(
    ("found", "count", "expected"),
    [
        (records("n01440764 n01443537 n01484850"), 3, [0, 1, 2]),  # as many as the network has: ImageNet's folders
        (records("7 8 9"), 1000, [7, 8, 9]),  # folders called by their numbers
        (records("0 1 10 2 3 4 5 6 7 8 9"), 11, [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]),  # not in the order of words
        (numbered([207, 3]), 1000, [207, 3]),
        (records("0 1 10 2 3 4 5 6 7 8 9", "prefix"), 11, list(range(11))),  # 2021: prefixes in the order of words
    ],
)
def test_a_network_without_names_has_numbers(found: Records, count: int, expected: list[int]) -> None:
    mapped, note = renumber(found, (), count, "NET")
    assert mapped.labels is not None and mapped.labels.tolist() == expected and "NET" in note


def test_a_network_without_names_refuses_what_it_cannot_place() -> None:
    for found, count in ((records("cat dog"), 1000), (records("cat dog ox"), 2), (records("7 8"), 5)):
        with pytest.raises(ValueError, match=f"it has {count} classes without names; .*0 to {count - 1}"):
            renumber(found, (), count, "NET")
    with pytest.raises(ValueError, match="does not know"):  # two folders for one class
        renumber(records("7 07"), (), 10, "NET")


def test_a_run_of_2021_goes_on_with_its_prefixes() -> None:
    """There every network had 1000 classes, and the prefixes at hand the first of them."""
    mapped, note = renumber(records("dog cat", "prefix"), (), 1000, "NET", as_2021=True)
    assert mapped.labels is not None and mapped.labels.tolist() == [1, 0]
    assert mapped.class_names == ("cat", "dog") and "cat, dog" in note
    with pytest.raises(ValueError, match="does not know"):
        renumber(records("dog cat", "prefix"), (), 1000, "NET")


def test_absent_classes_are_noted_and_no_labels_stay_none() -> None:
    _, note = renumber(records("0 2"), ("0", "1", "2"), 3, "NET")
    assert "no images of 1 of its classes: 1" in note
    plain = Records(("a", "b"))
    assert renumber(plain, DIGITS, 10, "NET") == (plain, "")
    _, quiet = renumber(records("0 1 2"), ("0", "1", "2"), 3, "NET")
    assert not quiet


def test_packed_data_whose_index_has_no_names() -> None:
    packed = Records(("0", "1"), np.array([3, 1]), (), "folders", "packed", root="DATA")
    assert renumber(packed, DIGITS, 10, "NET")[0].labels.tolist() == [3, 1]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="does not know"):
        renumber(packed, (), 2, "NET")


def test_words_of_a_command_line() -> None:
    names = ("cat", "dog", "7")
    assert [number_of(word, names, 4) for word in ("dog", "0", "7", "3")] == [1, 0, 2, 3]
    assert [number_of(word, names, 4) for word in ("2", "4", "Dog", "-1", "²")] == [None] * 5
    assert number_of("0", ("7", "8", "9"), 3) is None and number_of("8", ("7", "8", "9"), 3) == 1
