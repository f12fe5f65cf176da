"""What is wrong with pictures of the larger embedded model, by what its renderer knows: no network, and no search.

`residue` is what the best fit of the named ground's form leaves of a picture far from its objects, root mean square
in thousandths of white;
`palette` how far an object's colours are from its true ones; `edges` how many pixels the strongest edges take.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image, Resampling

from fastdit.mini.large.scenes import OBJECTS, Scene, parse
from training.large.measures import edge_width, fit_ground, palette_distance

#: A fit takes two seconds at 512 pixels, and a quarter of that at this size.
_FITTED = 256


def truth(images: Sequence[Image], prompts: Sequence[str], fitted: int) -> dict[str, list[float]]:
    """Give each measure's samples, in the prompts' order: of all pictures, or the first `fitted` where a fit is needed.

    The palette is that of prompts of one object by its name. All prompts name their ground.
    """
    found: dict[str, list[float]] = {
        "residue": [],
        "palette": [],
        "edges": [edge_width(_pixels(one)) for one in images],
    }
    for image, prompt in list(zip(images, prompts, strict=True))[:fitted]:
        scene = parse(prompt)
        assert scene.ground is not None
        pixels = _pixels(image.resize((_FITTED, _FITTED), Resampling.BOX))
        fit = fit_ground(pixels, scene.ground)
        found["residue"].append(1000.0 * fit.residue)
        if _of_one_object(scene):
            found["palette"].append(palette_distance(pixels, fit.objects, scene.nouns[0]))
    return found


def _of_one_object(scene: Scene) -> bool:
    return scene.count == 1 and scene.relation is None and scene.nouns[0] in OBJECTS


def _pixels(image: Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0).permute(2, 0, 1)
