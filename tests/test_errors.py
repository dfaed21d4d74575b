"""Messages that hold text from outside: nothing in them may steer a terminal."""

import unicodedata

import pytest

from minigrad.errors import MinigradError, ShapeError, StateError, printable

ESCAPED = [
    ("a\x1b[31mred", r"a\x1b[31mred"),  # a colour
    ("bell\x07", r"bell\x07"),
    ("two\nlines\r", r"two\nlines\r"),
    ("tab\there", r"tab\there"),
    ("exe\u202egnp.", r"exe\u202egnp."),  # written from right to left
    ("a\u2066b\u200bc\ufeff", r"a\u2066b\u200bc\ufeff"),
    ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
    ("\x9b31m\x85", r"\x9b31m\x85"),  # the same as ESC [ and newline, in eight bits
    ("\ud800", r"\ud800"),  # half of a character, which no stream could encode
    ("\ue000\U000e0041\U0010ffff", r"\ue000\U000e0041\U0010ffff"),
]
KEPT = [
    "Plain text, 3×3 − 1 … ∞",
    "café, Ωμέγα, 猫, кошка, قطة",
    "no\xa0break and\u3000wide spaces",
    "🐈",
    "back\\slash",
    "",
]


@pytest.mark.parametrize(("text", "escaped"), ESCAPED)
def test_what_steers_a_terminal_is_escaped(text, escaped):
    assert printable(text) == escaped
    assert printable(escaped) == escaped  # twice is once


@pytest.mark.parametrize("text", KEPT)
def test_letters_of_any_language_and_spaces_stay(text):
    assert printable(text) == text


def test_of_all_characters_the_seven_categories_are_escaped_and_no_others():
    kinds = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    for code in [*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000), *range(0xE0000, 0xE0100)]:
        text = f"<{chr(code)}>"
        assert (printable(text) != text) == (unicodedata.category(chr(code)) in kinds), hex(code)


@pytest.mark.parametrize("kind", [MinigradError, ShapeError, StateError])
def test_an_error_is_printed_escaped_and_its_layer_path_too(kind):
    error = kind("unexpected (1): \x1b]0;title\x07")
    assert str(error) == r"unexpected (1): \x1b]0;title\x07"
    error.layer_path = "a\nb"
    assert str(error) == r"a\nb: unexpected (1): \x1b]0;title\x07"
