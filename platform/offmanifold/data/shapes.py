"""Generated photographs' stand-ins: circles and squares, as files in the layout of cats and dogs. They always work, and show nothing."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from offmanifold.randomness import derive

NAME = "generated shapes"
CLASSES = ("Circle", "Square")
IMAGES_A_CLASS = 250
RECIPE_VERSION = 1


@dataclass(frozen=True)
class Shapes:
    """JPEG files that are drawn when they are read: ``Circle/0.jpg``, of its name alone."""

    name: str = NAME

    def files(self) -> list[tuple[str, int]]:
        """Their names; their sizes are their recipe's version."""
        return [(f"{name}/{number}.jpg", RECIPE_VERSION) for name in CLASSES for number in range(IMAGES_A_CLASS)]

    def read(self, path: str) -> bytes:
        """A shape of some colour, place and size, turned, on a cloudy background of another colour."""
        random = np.random.default_rng(derive("shapes", path))
        width, height = (int(side) for side in random.integers(80, 120, size=2))
        side = min(width, height)
        clouds = Image.fromarray(random.integers(0, 110, (4, 4, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        radius = float(random.uniform(0.25, 0.4)) * side
        x, y = (float(random.uniform(radius, length - radius)) for length in (width, height))
        draw, colour = ImageDraw.Draw(clouds), tuple(int(value) for value in random.integers(150, 256, 3))
        angle = float(random.uniform(-10, 10))
        if path.startswith("Circle"):
            draw.circle((x, y), radius, fill=colour)
        else:
            draw.regular_polygon((x, y, radius), 4, rotation=angle, fill=colour)
        noise = random.normal(0, 8, (height, width, 3))
        grainy = Image.fromarray((np.asarray(clouds) + noise).clip(0, 255).astype(np.uint8))
        stream = BytesIO()
        grainy.save(stream, "JPEG", quality=90)
        return stream.getvalue()
