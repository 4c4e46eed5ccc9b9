"""Files of many small requests, as `sample --requests` reads them. Does not load torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..runtime import storage


def objects(path: str) -> Iterator[tuple[str, Any]]:
    """("line 3" or "entry 3", value) of each request in a file: a JSON list, or one JSON object per line. ValueError if it is neither."""
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")  # some editors begin a file with a byte-order mark
    except FileNotFoundError:
        raise FileNotFoundError(f"--requests {path}: there is no such file") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"--requests {path} is no text file: {error}") from None
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--requests {path} starts with [ but is not valid JSON: {error}") from None
        yield from ((f"entry {number}", value) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"--requests {path}, line {number} is no JSON ({error}); write one object per line, or a list"
                ) from None
