"""Serve pictures over HTTP: some twins that share one pipeline's weights, warmed up for the sizes that are served.

python docs/examples/server.py                # ProgressiveResolution 4x with TeaCache
python docs/examples/server.py --stack stack  # what Stack.save_pretrained wrote to the folder `stack`
curl "http://127.0.0.1:8000/?prompt=a+cat+on+a+blue+background&size=128&seed=1" --output cat.png
"""

from __future__ import annotations

import argparse
import io
import queue
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from fastdit import ProgressiveResolution, Stack, TeaCache, accelerate, load_mini

#: Pixels on a side. Other sizes are refused: an engine would be built for each while its first request waits.
SIZES = (128, 256)


class Pictures:
    """Makes pictures, one in each twin at a time; whoever finds none idle waits."""

    def __init__(self, stack: Stack, twins: int) -> None:
        pipeline = load_mini()
        pipeline.set_progress_bar_config(disable=True)
        self.idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(twins):
            twin = accelerate(pipeline, stack)
            for size in SIZES:
                # A stack without an engine has nothing to build. Engines that the first twin built are found on disk.
                print(twin.fastdit.warmup(size, size, progress=False))
            self.idle.put(twin)

    def png(self, prompt: str, size: int, seed: int) -> bytes:
        """Make a picture. Raises `ValueError` for a size that is not served."""
        if size not in SIZES:
            raise ValueError(f"the sizes are {', '.join(map(str, SIZES))}, got {size}")
        twin = self.idle.get()
        try:
            noise = torch.Generator().manual_seed(seed)
            picture = twin(prompt, height=size, width=size, generator=noise).images[0]
        finally:
            self.idle.put(twin)
        written = io.BytesIO()
        picture.save(written, format="PNG")
        return written.getvalue()


def serve(pictures: Pictures, port: int) -> ThreadingHTTPServer:
    """Make the server; `serve_forever` runs it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
            try:
                size, seed = int(asked.get("size", SIZES[-1])), int(asked.get("seed", 0))
                status, kind, body = 200, "image/png", pictures.png(asked.get("prompt", ""), size, seed)
            except ValueError as error:  # InvalidConfig is one
                status, kind, body = 400, "text/plain", str(error).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", type=Path, help="a folder that Stack.save_pretrained wrote")
    parser.add_argument("--twins", type=int, default=2, help="how many pictures are made at a time")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    chosen = Stack([ProgressiveResolution("4x"), TeaCache(0.25)])
    if options.stack is not None:
        chosen = Stack.from_pretrained(options.stack)
    serve(Pictures(chosen, options.twins), options.port).serve_forever()
