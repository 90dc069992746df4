"""The forgetting probe has text of its own, and reads a user's."""

import pytest

from ftray.errors import DataError
from ftray.evaluate.general import MAX_PARAGRAPHS, general_text


def test_the_text_that_comes_with_ftray_is_150_different_plain_paragraphs():
    paragraphs = general_text(True)
    assert len(paragraphs) == len(set(paragraphs)) == 150
    assert all(100 < len(text) < 400 and text[0].isupper() and text.endswith(".") for text in paragraphs)


def test_no_probe_needs_no_text():
    assert general_text(False) == []


def test_a_file_is_read_by_paragraphs_or_else_by_lines(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes(b"One\r\nparagraph.\r\n\r\n\r\nAnother one.\r\n")
    assert general_text(str(file)) == ["One paragraph.", "Another one."]
    file.write_text("First line.\nSecond line.\n")
    assert general_text(str(file)) == ["First line.", "Second line."]
    file.write_text("line\n" * 10_000)
    assert len(general_text(str(file))) == MAX_PARAGRAPHS


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b" \n\n ", "holds no text"), (b"caf\xe9", "byte 3 is not UTF-8")]
)
def test_a_file_that_cannot_be_used_is_named_with_the_way_out(tmp_path, content, reason):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        general_text(str(file))
    assert str(file) in str(error.value)
    assert "or write true" in str(error.value)
