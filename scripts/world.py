"""A small captioned world: one or two shapes on a background, rendered from signed distances.

A `Scene` is drawn at random, told in words (`caption`) and painted (`render`). Everything is a function of the
random generator it is given, so a seed names a data set.

Units: positions and radii in pixels of a 128-pixel image, x to the right, y down; rendering at another size scales.
Source of the distance functions: Inigo Quilez, iquilezles.org/articles/distfunctions2d, rederived where simpler.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 150, 64),
    "blue": (38, 84, 214),
    "yellow": (250, 212, 44),
    "purple": (122, 44, 168),
    "orange": (246, 128, 24),
    "pink": (250, 152, 192),
    "teal": (18, 154, 160),
    "white": (245, 245, 245),
    "black": (26, 26, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
SIZES = {"large": (23.0, 27.0), "small": (12.5, 15.0)}  # radius of the circle an object fills
FILLS = ("plain", "striped")
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # from the second object
SIDE = 128
STRIPE_PERIOD = 10.0


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: str
    fill: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]  # one or two
    relation: str | None  # of the first object to the second
    background: str
    light: float  # direction the light comes from, radians


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene: one object (30 %) or two side by side, in colours that differ from the background's."""
    background = str(rng.choice(list(COLOURS)))
    palette = [c for c in COLOURS if c != background]
    centre = np.array([SIDE / 2, SIDE / 2])
    if rng.random() < 0.3:
        relation, places = None, [centre + rng.uniform(-18, 18, size=2)]
    else:
        relation = str(rng.choice(list(RELATIONS)))
        axis = np.array(RELATIONS[relation], dtype=float)
        middle = centre + rng.uniform(-3, 3, size=2)
        apart = rng.uniform(30, 33)
        sway = axis[::-1] * rng.uniform(-9, 9)  # along the other axis, in opposite directions
        places = [middle + apart * axis + sway, middle - apart * axis - sway]
    return Scene(
        objects=tuple(_sample_object(rng, palette, place) for place in places),
        relation=relation,
        background=background,
        light=float(rng.uniform(0, 2 * np.pi)),
    )


def _sample_object(rng: np.random.Generator, palette: list[str], place: Array) -> Object:
    size = str(rng.choice(list(SIZES)))
    return Object(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(palette)),
        size=size,
        fill=str(rng.choice(FILLS, p=(0.6, 0.4))),
        x=float(place[0]),
        y=float(place[1]),
        radius=float(rng.uniform(*SIZES[size])),
    )


# --- words ---------------------------------------------------------------------------------------------------------

SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}


def caption(scene: Scene) -> str:
    """The plain wording: "a large red circle above a small striped blue star on a yellow background"."""
    parts = [_article(f"{o.size} {'striped ' * (o.fill == 'striped')}{o.colour} {o.shape}") for o in scene.objects]
    relation = f" {scene.relation} " if scene.relation else ""
    return relation.join(parts) + f" on {_article(scene.background)} background"


def parse_caption(text: str) -> Scene | None:
    """What a plain caption tells, without places; None for any other text."""
    thing = rf"an? ({'|'.join(SIZES)}) (striped )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    whole = rf"{thing}(?: ({'|'.join(RELATIONS)}) {thing})? on an? ({'|'.join(COLOURS)}) background"
    found = re.fullmatch(whole, text)
    if found is None:
        return None
    *first, relation, size, fill, colour, shape, background = found.groups()
    parts = [first, [size, fill, colour, shape]] if relation else [first]
    objects = tuple(
        Object(shape, colour, size, "striped" if fill else "plain", 0.0, 0.0, SIZES[size][0])
        for size, fill, colour, shape in parts
    )
    return Scene(objects, relation, background, 0.0)


def vary_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The same scene in free wording: articles, synonyms, order of adjectives; sizes and background may be left out."""

    def phrase_of(o: Object) -> str:
        adjectives = [o.colour]
        if rng.random() < 0.85:
            first = rng.random() < 0.75
            adjectives.append(SIZE_WORDS[o.size][0 if first else 1])
        if o.fill == "striped" or rng.random() < 0.3:
            adjectives.append(o.fill)
        if rng.random() < 0.4:
            adjectives = [str(a) for a in rng.permutation(adjectives)]
        else:
            adjectives = adjectives[1:] + adjectives[:1]  # the usual order: size, fill, colour
        phrase = " ".join([*adjectives, o.shape])
        draw = rng.random()
        return _article(phrase) if draw < 0.75 else f"the {phrase}" if draw < 0.85 else phrase

    words = phrase_of(scene.objects[0])
    if scene.relation:
        words += f" {rng.choice(RELATION_WORDS[scene.relation])} " + phrase_of(scene.objects[1])
    if rng.random() < 0.95:
        on = "on" if rng.random() < 0.8 else "against"
        article = _article(scene.background) if rng.random() < 0.85 else scene.background
        words += f" {on} {article} background"
    return words


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# --- pictures ------------------------------------------------------------------------------------------------------
# Signed distances for shapes of radius 1 centred at the origin: negative inside. x, y (H, W) -> (H, W).


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.95


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.82, 0.82)


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _polygon(points: Array) -> Callable[[Array, Array], Array]:
    """Distance to a closed polygon: nearest edge for the size, crossing number for the sign."""

    def distance(x: Array, y: Array) -> Array:
        nearest = np.full(x.shape, np.inf)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
            if ey != 0:
                inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
        return np.where(inside, -1, 1) * np.sqrt(nearest)

    return distance


def _spokes(radii: tuple[float, ...], count: int, turn: float) -> Array:
    angles = turn + 2 * np.pi * np.arange(count) / count
    radius = np.resize(radii, count)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _heart(x: Array, y: Array) -> Array:
    # iq's heart stands on its tip at the origin, is 1.1 high and points up; move and flip it to be centred.
    x, y = np.abs(x) * 0.62, 0.54 - y * 0.62
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    diagonal = 0.5 * np.maximum(x + y, 0)
    flank = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - diagonal) ** 2 + (y - diagonal) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, flank) / 0.62


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.72) - 0.24


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95))


DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon(_spokes((1.08,), 3, -np.pi / 2) + np.array([0.0, 0.2])),
    "star": _polygon(_spokes((1.08, 0.46), 10, -np.pi / 2)),
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "diamond": _polygon(np.array([(0.0, -1.05), (0.72, 0.0), (0.0, 1.05), (-0.72, 0.0)])),
}


def render(scene: Scene, side: int = SIDE) -> Array:
    """Paint a scene with anti-aliased edges, soft shadows and a light gradient. Shapes: -> (side, side, 3) uint8."""
    scale = side / SIDE
    centres = (np.arange(side) + 0.5) / scale
    x, y = np.meshgrid(centres, centres)
    lx, ly = np.cos(scene.light), np.sin(scene.light)
    slope = ((x - SIDE / 2) * lx + (y - SIDE / 2) * ly) / SIDE  # -0.7 ... 0.7, brightest towards the light
    image = _shade(np.array(COLOURS[scene.background], dtype=float), 0.16 * slope)
    for o in scene.objects:
        distance = _distance(o, x, y)
        shadow = _distance(o, x + 2.5 * lx, y + 2.5 * ly)  # falls away from the light
        image *= 1 - 0.3 * _smoothstep((3.5 - shadow) / 7.0)[..., None]
        bevel = 0.10 * ((x - o.x) * lx + (y - o.y) * ly) / o.radius
        paint = _shade(np.array(COLOURS[o.colour], dtype=float), bevel)
        if o.fill == "striped":
            wave = np.sin(2 * np.pi * (x - o.x + y - o.y) / (np.sqrt(2) * STRIPE_PERIOD))
            band = np.clip(0.5 + wave * STRIPE_PERIOD / 4 * scale, 0, 1)[..., None]
            paint = paint * (1 - band) + band * _shade(_stripe_colour(o.colour), bevel)
        cover = np.clip(0.5 - distance * scale, 0, 1)[..., None]  # one pixel of anti-aliasing
        image = image * (1 - cover) + paint * cover
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _distance(o: Object, x: Array, y: Array) -> Array:
    return DISTANCES[o.shape]((x - o.x) / o.radius, (y - o.y) / o.radius) * o.radius


def _stripe_colour(colour: str) -> Array:
    """The second tone of a striped fill: darker, or lighter where the colour is too dark for that."""
    rgb = np.array(COLOURS[colour], dtype=float)
    return rgb + 0.45 * (255 - rgb) if colour in ("black", "blue", "purple") else 0.55 * rgb


def _shade(rgb: Array, amount: Array) -> Array:
    """Lighten (towards white) or darken by a fraction per pixel. Shapes: rgb (3,), amount (H, W) -> (H, W, 3)."""
    lighter = np.maximum(amount, 0)[..., None]
    darker = np.minimum(amount, 0)[..., None]
    return rgb * (1 + darker) + (255 - rgb) * lighter


def _smoothstep(x: Array) -> Array:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)
