"""The pieces of a sentencepiece model, and how it cuts, read from its file without the library.

The file is a protocol buffer. Three fields of it are known here; others are passed over. Read files.py before this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from slerpkit.files import read_bytes
from slerpkit.messages import SlerpMergeError

MAX_SENTENCEPIECE_BYTES = 64_000_000
NAMES = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "sentencepiece.model")
# Under this name fairseq's models have their pieces, and begin with four of their own in place of the file's three.
FAIRSEQ_NAME = "sentencepiece.bpe.model"
FAIRSEQ_PIECES, FILE_PIECES = ("<s>", "<pad>", "</s>", "<unk>"), ("<unk>", "<s>", "</s>")
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of a field in a protocol buffer
PIECE_FIELD, NORMALIZER_FIELD, TEXT_FIELD = 1, 3, 1


def find_sentencepiece(folder: Path) -> Path | None:
    """A folder's sentencepiece model; None where it has none."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def read_pieces(path: Path) -> dict[str, int]:
    """Every piece of a sentencepiece model with its id.

    Raises SlerpMergeError where the file is something else, is cut short, or has a piece twice.
    """
    try:
        pieces = [text_of(field) for number, field in read_fields(path) if number == PIECE_FIELD]
    except ValueError as error:  # UnicodeDecodeError among these
        raise broken_model(path) from error
    if not pieces or len(set(pieces)) < len(pieces):
        raise broken_model(path)
    if path.name == FAIRSEQ_NAME and tuple(pieces[: len(FILE_PIECES)]) == FILE_PIECES:
        pieces = [*FAIRSEQ_PIECES, *pieces[len(FILE_PIECES) :]]
    return {piece: token_id for token_id, piece in enumerate(pieces)}


def read_cutting(path: Path) -> dict[str, str]:
    """A digest of what decides how a sentencepiece model cuts: its normalizer, and its pieces with their scores."""
    names = {NORMALIZER_FIELD: "sentencepiece normalizer", PIECE_FIELD: "scores of pieces"}
    digests = {number: hashlib.sha256() for number in names}
    for number, field in read_fields(path):
        if number in names:
            digests[number].update(field)
    return {name: digests[number].hexdigest()[:12] for number, name in names.items()}


def broken_model(path: Path) -> SlerpMergeError:
    """The error for a file that cannot be read as a sentencepiece model."""
    return SlerpMergeError(f"{path} is no sentencepiece model, or is damaged.", "Download it again.")


def read_fields(path: Path) -> list[tuple[int, bytes]]:
    """The fields of a sentencepiece model that are bytes. Raises SlerpMergeError where the file is none."""
    try:
        return list(fields_of(read_bytes(path, MAX_SENTENCEPIECE_BYTES)))
    except ValueError as error:
        raise broken_model(path) from error


def text_of(piece: bytes) -> str:
    """The text of a piece; its score and its kind follow it. Raises ValueError where it has none."""
    texts = [field.decode("utf-8") for number, field in fields_of(piece) if number == TEXT_FIELD]
    if not texts:
        raise ValueError("a piece without text")
    return texts[-1]


def fields_of(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each field of a message that is bytes. Raises ValueError where that is no message."""
    place = 0
    while place < len(message):
        key, place = read_varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            _, place = read_varint(message, place)
            continue
        if kind not in (FIXED64, BYTES, FIXED32):
            raise ValueError("a field of no known kind")
        length = {FIXED64: 8, FIXED32: 4}.get(kind)
        if length is None:
            length, place = read_varint(message, place)
        if length > len(message) - place:
            raise ValueError("a field that goes on behind the end")
        if kind == BYTES:
            yield number, message[place : place + length]
        place += length


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """(number, the place behind it): seven bits a byte, the lowest first. Raises ValueError where it has no end."""
    number = 0
    for shift in range(0, 70, 7):
        if place == len(data):
            break
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("a number without an end")
