"""The example of a server serves pictures of the sizes that it was warmed up for, several at a time."""

from __future__ import annotations

import importlib.util
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from PIL import Image

from fastdit import ProgressiveResolution, Stack

FILE = Path(__file__).parents[2] / "docs" / "examples" / "server.py"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    spec = importlib.util.spec_from_file_location("server", FILE)
    assert spec is not None and spec.loader is not None
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    running = server.serve(server.Pictures(Stack([ProgressiveResolution("14x")]), twins=2), port=0)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()
    running.server_close()
    thread.join()


def asked(address: str, **query: object) -> bytes:
    with urlopen(f"{address}?{urlencode(query)}") as answer:
        body: bytes = answer.read()
    return body


def test_pictures_are_served_while_others_are_made(address: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda seed: asked(address, prompt="a cat", size=128, seed=seed), (1, 2, 1)))
    assert made[0] == made[2] != made[1]
    assert Image.open(io.BytesIO(made[0])).size == (128, 128)


@pytest.mark.parametrize(("query", "said"), [({"size": 200}, "the sizes are 128, 256"), ({"seed": "x"}, "invalid")])
def test_what_is_not_served_is_said(query: dict[str, object], said: str, address: str) -> None:
    with pytest.raises(HTTPError) as refused:
        asked(address, prompt="a cat", **query)
    with refused.value as answer:
        assert answer.code == 400 and said in answer.read().decode()
