"""Reading text files whose faults are named by path and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gcl_kernels.retrieval.datasets import DataError


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line, blank ones left out.

    Raises:
        DataError: the file is missing, or not UTF-8.
    """
    number = 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1}: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line of a JSONL file.

    Raises:
        DataError: as `lines`, or a line that is no JSON object.
    """
    for number, line in lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected an object, got {line.strip()[:60]}")
        yield number, record


def json_file(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: the file is missing, or no JSON.
    """
    try:
        return json.loads(text_file(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: {error.msg}") from None


def text_file(path: Path) -> str:
    """All of a small file.

    Raises:
        DataError: the file is missing, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}") from None
