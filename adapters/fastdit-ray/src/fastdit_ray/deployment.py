"""The deployment: replicas of `Pictures` behind Ray Serve, by its handles and over HTTP."""

from __future__ import annotations

import io
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdit.errors import FastditError, InvalidConfig
from fastdit_ray.pictures import Asked, Pictures, Served

if TYPE_CHECKING:
    from PIL.Image import Image


class Replica:
    """A replica: warm when it begins, one picture at a time."""

    def __init__(self, served: Served) -> None:
        self._pictures = Pictures(served)

    def picture(self, asked: Asked) -> Image:
        """Make a picture for a handle, `handle.picture.remote(Asked(256, 256, "a cat"))`. Raises as `Pictures.make`."""
        return self._pictures.make(asked)

    def compilations(self) -> int:
        """Count the engines that this replica asked for since it was warm."""
        return self._pictures.compilations

    async def __call__(self, request: Any) -> Any:
        """Answer HTTP: `?prompt=a+cat&height=256&width=256&seed=1` with a PNG, and 400 with what was wrong."""
        from starlette.responses import PlainTextResponse, Response

        given = request.query_params
        try:
            asked = Asked(int(given["height"]), int(given["width"]), given.get("prompt"), int(given.get("seed", 0)))
            image = self.picture(asked)
        except KeyError as error:
            return PlainTextResponse(f"give {error.args[0]}, in pixels", status_code=400)
        except (FastditError, ValueError) as error:
            return PlainTextResponse(f"{type(error).__name__}: {error}", status_code=400)
        written = io.BytesIO()
        image.save(written, format="PNG")
        return Response(written.getvalue(), media_type="image/png")


def serve() -> Any:
    """Import Ray Serve. Raises `InvalidConfig` with the command that installs it."""
    try:
        return import_module("ray.serve")
    except ImportError as error:
        raise InvalidConfig(
            f"serving needs Ray Serve, which can't be imported ({error}); run: pip install 'ray[serve]'"
        ) from error


def application(served: Served, **options: Any) -> Any:
    """Make what `serve.run` takes; `options` are those of `serve.deployment`, such as `num_replicas`.

    Give each replica a GPU by `ray_actor_options={"num_gpus": 1}`. A replica makes one picture at a time, so others
    wait in its queue or at another one. Raises `InvalidConfig` without Ray Serve.
    """
    return serve().deployment(Replica, **{"name": "fastdit", **options}).bind(served)
