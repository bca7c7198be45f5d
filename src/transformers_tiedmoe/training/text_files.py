"""Read `.txt`, `.json`, `.jsonl` and `.parquet` files, compressed or not, row by row, as text and nothing but text.

The builders of `datasets` are not used: they crash on `null`, turn dates into timestamps, and unpack an archive of any
size onto the disk. Here a compressed file is read as a stream, and only so far as text could expand.
"""

import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import TiedMoeError

KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".xz", ".gz", ".zst")
# Text compresses to a fifth, logs to a hundredth; what expands further is no text, however large a machine is.
MAX_EXPANSION = 250
SMALL_BYTES = 64 << 20  # may be reached whatever the file's size
LINE_LENGTH = 1 << 16  # characters of a text file's line that make a row; a longer one is cut
PARQUET_ROWS = 64  # read at a time: a page may repeat one long value for very many rows


def kind_of(path: Path) -> str | None:
    """Return the kind of content that a file's name tells: "text", "json" or "parquet"; None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def read_rows(files: list[tuple[str, ...]], text_column: str) -> Iterator[dict[str, str]]:
    """Yield `{"text": ...}` for every line of text files, and for every row of others that is not null or empty.

    Args:
        files: of one kind, in order: the path first; what else stands beside it is for a cache to tell versions apart.
        text_column: the field or column to read if the files have any.

    Raises:
        TiedMoeError: a file that is damaged, is not UTF-8, expands without end, or has no text in that column.
    """
    for name, *_ in files:
        path = Path(name)
        kind = kind_of(path)
        num_rows = 0
        try:
            with _open(path) as file:
                rows = {"text": _lines, "json": _json_rows, "parquet": _parquet_rows}[kind or "text"]
                for text in filter(None, rows(file, text_column)):
                    num_rows += 1
                    yield {"text": text}
        except TiedMoeError as error:
            raise _unreadable(path, kind, error) from error
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            place = f"after row {num_rows}: " if num_rows else ""
            raise _unreadable(path, kind, f"{place}{error or type(error).__name__}") from error
        if num_rows == 0:
            raise _unreadable(path, kind, "it holds no text")


def _unreadable(path: Path, kind: str | None, problem: object) -> TiedMoeError:
    return TiedMoeError(
        f"{path} cannot be read as {kind} ({problem}); expected UTF-8 text that is not empty, JSON lines or Parquet, "
        "as its name says"
    )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for its bytes, decompressed."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file, contextlib.ExitStack() as stack:
        expanded: Any = file
        if suffix == ".xz":
            expanded = stack.enter_context(lzma.open(file))
        elif suffix == ".gz":
            expanded = stack.enter_context(gzip.open(file))
        elif suffix == ".zst":
            expanded = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
        if suffix in COMPRESSIONS:
            most = max(SMALL_BYTES, MAX_EXPANSION * path.stat().st_size)
            yield io.BufferedReader(_Bounded(expanded, most), 1 << 20)
        else:
            yield file


class _Bounded(io.RawIOBase):
    """A stream that ends with an error once it has given more than `most` bytes."""

    def __init__(self, stream: Any, most: int):
        self.stream = stream
        self.most = self.left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            content = self.stream.read(len(buffer))
        except Exception as error:  # whatever damage makes the libraries raise
            raise TiedMoeError(f"it is damaged: {error or type(error).__name__}") from error
        self.left -= len(content)
        if self.left < 0:
            raise TiedMoeError(
                f"it expands to more than {self.most} bytes, {MAX_EXPANSION} times its size: no text does; expand it "
                "yourself if it is one"
            )
        buffer[: len(content)] = content
        return len(content)


def _decoded(file: io.BufferedReader) -> Iterator[str]:
    """Yield the lines of a file with their ends; a byte order mark is dropped."""
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), 1):
        if "\0" in line:
            raise TiedMoeError(f"line {number} holds a NUL byte: binary data, or UTF-16")
        yield line


def _lines(file: io.BufferedReader, text_column: str) -> Iterator[str]:
    return (line[i : i + LINE_LENGTH] for line in _decoded(file) for i in range(0, len(line), LINE_LENGTH))


def _json_rows(file: io.BufferedReader, text_column: str) -> Iterator[str | None]:
    """Yield the text of every row of JSON lines, or of one JSON array of rows."""
    first = file.peek(1)[:1]
    if first == b"[":
        rows = json.loads("".join(_decoded(file)))
        for number, row in enumerate(rows, 1):
            yield text_of(row, text_column, f"element {number}")
        return
    for number, line in enumerate(_decoded(file), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TiedMoeError(f"line {number} is no JSON: {error}") from error
            yield text_of(row, text_column, f"line {number}")


def text_of(row: Any, text_column: str, place: str) -> str | None:
    """Return the text of a JSON row, an object with the column or a string; None for null."""
    if isinstance(row, dict):
        if text_column not in row:
            raise TiedMoeError(
                f"{place} has no column {text_column!r}, only {list(row)[:20]}; name the column of the text "
                "(text_column)"
            )
        row = row[text_column]
        if row is None:
            return None
    if not isinstance(row, str):
        raise TiedMoeError(f"{place} holds {json.dumps(row)[:60]} where text is expected")
    row.encode("utf-8")  # half of a surrogate pair is a ValueError here, and no text
    return row


def _parquet_rows(file: io.BufferedReader, text_column: str) -> Iterator[str | None]:
    source = file if file.seekable() else pa.BufferReader(file.read())  # its footer is at the end
    parquet = pq.ParquetFile(source)
    schema = parquet.schema_arrow
    if text_column not in schema.names:
        raise TiedMoeError(
            f"it has no column {text_column!r}, only {schema.names[:20]}; name the column of the text (text_column)"
        )
    if schema.names.count(text_column) > 1:
        raise TiedMoeError(f"it has several columns {text_column!r}; leave one of them")
    found = schema.field(text_column).type
    content = found.value_type if pa.types.is_dictionary(found) else found  # the former of values that repeat
    if not (pa.types.is_string(content) or pa.types.is_large_string(content) or pa.types.is_string_view(content)):
        raise TiedMoeError(f"column {text_column!r} holds {found} where text is expected")
    for batch in parquet.iter_batches(PARQUET_ROWS, columns=[text_column]):
        yield from batch.column(0).to_pylist()
