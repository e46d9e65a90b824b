import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax.evaluation.text_files import read_text, write_text

keys = st.from_regex(r"[A-Za-z0-9_.,甲\-]{1,8}", fullmatch=True)
# The two characters `\n` are how a line break is written, so a text cannot hold them itself.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\\"), max_size=20)


@given(st.dictionaries(keys, texts, max_size=6))
def test_reading_returns_what_was_written(tmp_path_factory, content):
  path = tmp_path_factory.mktemp("files") / "text"
  write_text(path, content)
  assert read_text(path) == content
  assert list(read_text(path)) == list(content)


def test_the_file_is_one_line_a_key(tmp_path):
  path = tmp_path / "new" / "folder" / "text"
  write_text(path, {"a": "你好\nhello\r\nthere", "b": "", "c": " x\u2028y"})
  assert path.read_bytes().decode() == "a\t你好\\nhello\\nthere\nb\t\nc\t x\u2028y\n"
  assert [p.name for p in path.parent.iterdir()] == ["text"]


def test_reading_takes_blanks_as_separator_and_windows_line_ends(tmp_path):
  path = tmp_path / "text"
  path.write_bytes("\ufeffa one two\r\n\r\nb\t three \nc   four \nd\ne\t\nf \tfive\n".encode())
  assert read_text(path) == {
    "a": "one two",
    "b": " three ",
    "c": "four",
    "d": "",
    "e": "",
    "f": "five",
  }


@pytest.mark.parametrize(
  "content, message",
  [
    (b"a x\nb y\na z\n", "text:3: duplicate key 'a' \\(first on line 1\\)"),
    (b"a x\n b y\n", "text:2: the line starts with white space"),
    (b"a x\nb \xff\n", "text:2: not UTF-8"),
  ],
)
def test_broken_files_are_named_with_their_line(tmp_path, content, message):
  path = tmp_path / "text"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read_text(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    read_text(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["", "a b", "a\tb", "a\n", "\ufeffa", "\u3000"])
def test_a_key_that_could_not_be_read_back_leaves_the_old_file(tmp_path, key):
  path = tmp_path / "text"
  write_text(path, {"old": "x"})
  with pytest.raises(ValueError, match="without white space"):
    write_text(path, {"good": "y", key: "z"})
  assert read_text(path) == {"old": "x"}
