"""A small captioned world: landscapes in flat layers, drawn from the sky down to the trees in front.

A `Scene` is what is told: time of day, ground, and the things that stand on it. `caption` puts it into words and
`render` paints it. What is not told is left to chance: outlines, places, sizes, the moon's phase, how many clouds.
Everything comes from the random generator that is given, so a seed names a data set.

Units: places and lengths are shares of the picture's side, x to the right, y down.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Array = np.ndarray
Points = list[tuple[float, float]]

SIDE = 128
FINE = 3  # the picture is drawn at this many times its size and averaged

TIMES = ("at dawn", "at noon", "at sunset", "at night")
GROUNDS: dict[str, tuple[int, int, int]] = {
    "green hills": (84, 150, 62),
    "golden hills": (216, 168, 62),
    "snowy hills": (232, 238, 246),
    "red dunes": (200, 92, 54),
}
HOUSES: dict[str, tuple[int, int, int]] = {
    "red": (200, 42, 40),
    "white": (246, 244, 236),
    "blue": (44, 92, 204),
    "yellow": (250, 206, 60),
}
TREES = ("pine", "oak")
MOST_TREES = 3
BALLOONS = ("red", "yellow")
NUMBERS = ("no", "a", "two", "three")


@dataclass(frozen=True)
class Scene:
    """What a caption tells. trees: kind and number, None where there are none."""

    time: str
    ground: str
    trees: tuple[str, int] | None = None
    house: str | None = None
    lake: bool = False
    mountains: bool = False
    clouds: bool = False
    balloon: str | None = None


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene: every time and ground is as likely as another, and each thing is there or not by itself."""
    return Scene(
        time=str(rng.choice(TIMES)),
        ground=str(rng.choice(list(GROUNDS))),
        trees=(str(rng.choice(TREES)), int(rng.integers(1, MOST_TREES + 1))) if rng.random() < 0.7 else None,
        house=str(rng.choice(list(HOUSES))) if rng.random() < 0.5 else None,
        lake=bool(rng.random() < 0.35),
        mountains=bool(rng.random() < 0.45),
        clouds=bool(rng.random() < 0.4),
        balloon=str(rng.choice(BALLOONS)) if rng.random() < 0.25 else None,
    )


# --- words ---------------------------------------------------------------------------------------------------------


def things(scene: Scene) -> list[str]:
    """The things of a scene as phrases, in the order of the plain caption."""
    phrases = []
    if scene.trees:
        phrases.append(_trees(*scene.trees))
    if scene.house:
        phrases.append(f"a {scene.house} house")
    phrases += ["a lake"] * scene.lake + ["mountains"] * scene.mountains + ["clouds"] * scene.clouds
    if scene.balloon:
        phrases.append(f"a {scene.balloon} balloon")
    return phrases


def _trees(kind: str, number: int) -> str:
    return f"{NUMBERS[number]} {kind}s" if number > 1 else f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


# What a caption tells, as questions with the phrases that answer them; "none" where a caption says nothing. A text
# encoder and a classifier are asked them.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "time": TIMES,
    "ground": tuple(GROUNDS),
    "trees": ("none", *(_trees(kind, number) for kind in TREES for number in range(1, MOST_TREES + 1))),
    "house": ("none", *(f"a {colour} house" for colour in HOUSES)),
    "lake": ("none", "a lake"),
    "mountains": ("none", "mountains"),
    "clouds": ("none", "clouds"),
    "balloon": ("none", *(f"a {colour} balloon" for colour in BALLOONS)),
}


def answers(scene: Scene) -> dict[str, int]:
    """For each question the number of the right answer."""
    told = {scene.time, scene.ground, *things(scene)}
    return {
        question: next((i for i, phrase in enumerate(possible) if phrase in told), 0)
        for question, possible in QUESTIONS.items()
    }


def caption(scene: Scene) -> str:
    """The plain wording: "snowy hills with two pines, a red house and mountains at sunset"."""
    return f"{scene.ground}{_with(things(scene))} {scene.time}"


def vary_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The same scene in free wording: the things in any order, and the time first in three captions of ten."""
    phrases = things(scene)
    told = scene.ground + _with([phrases[i] for i in rng.permutation(len(phrases))])
    return f"{scene.time} {told}" if rng.random() < 0.3 else f"{told} {scene.time}"


def parse_caption(text: str) -> Scene | None:
    """The scene that a plain caption tells; None for any other text."""
    whole = re.fullmatch(rf"({'|'.join(GROUNDS)})(?: with (.+))? ({'|'.join(TIMES)})", text)
    if whole is None:
        return None
    ground, listed, time = whole.groups()
    told = re.split(r", | and ", listed or "")
    trees = {_trees(kind, number): (kind, number) for kind in TREES for number in range(1, MOST_TREES + 1)}
    scene = Scene(
        time,
        ground,
        trees=next((trees[phrase] for phrase in told if phrase in trees), None),
        house=next((colour for colour in HOUSES if f"a {colour} house" in told), None),
        lake="a lake" in told,
        mountains="mountains" in told,
        clouds="clouds" in told,
        balloon=next((colour for colour in BALLOONS if f"a {colour} balloon" in told), None),
    )
    return scene if caption(scene) == text else None


def _with(phrases: list[str]) -> str:
    if not phrases:
        return ""
    *most, last = phrases
    return f" with {', '.join(most)} and {last}" if most else f" with {last}"


# --- light ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Light:
    """A time of day: colours of the sky at its top and at the horizon, of what light falls on, and of the sun."""

    top: tuple[int, int, int]
    low: tuple[int, int, int]
    tint: tuple[float, float, float]  # what it multiplies colours by
    sun: tuple[int, int, int]
    radius: float
    windows: tuple[int, int, int]


DAYLIGHT, LAMPLIGHT = (150, 190, 220), (255, 226, 130)
LIGHTS = {
    "at dawn": Light((104, 132, 196), (252, 196, 178), (1.0, 0.92, 0.95), (255, 238, 204), 0.070, LAMPLIGHT),
    "at noon": Light((66, 146, 232), (192, 228, 250), (1.0, 1.0, 1.0), (255, 246, 184), 0.062, DAYLIGHT),
    "at sunset": Light((88, 48, 112), (252, 142, 62), (1.0, 0.82, 0.70), (255, 216, 122), 0.095, LAMPLIGHT),
    "at night": Light((10, 14, 42), (42, 54, 104), (0.42, 0.50, 0.70), (240, 240, 226), 0.060, LAMPLIGHT),
}


# --- pictures ------------------------------------------------------------------------------------------------------

# Each thing that is told must be seen: so many pixels of a 128-pixel picture, of each tree and of all clouds together.
LEAST_SEEN = {"tree": 130, "house": 300, "lake": 350, "mountains": 450, "clouds": 300, "balloon": 190}
_MARKS = {"tree": 1, "house": MOST_TREES + 1, "balloon": MOST_TREES + 2, "lake": MOST_TREES + 3}
_MARKS |= {"mountains": MOST_TREES + 4, "clouds": MOST_TREES + 5}
SMALL_THINGS = range(1, MOST_TREES + 3)  # marks of trees, house and balloon


def render(scene: Scene, rng: np.random.Generator) -> Array:
    """Paint a scene. Shapes: -> (SIDE, SIDE, 3) uint8."""
    return render_marked(scene, rng)[0]


def render_marked(scene: Scene, rng: np.random.Generator) -> tuple[Array, Array]:
    """Paint a scene and mark which thing is seen at which pixel; places are drawn again until each can be seen.

    Shapes: -> (SIDE, SIDE, 3) uint8, (SIDE, SIDE) uint8: 1, 2, 3 a tree, 4 the house, 5 the balloon, then the rest.
    """
    for _ in range(100):
        canvas = _paint(scene, rng)
        marks = np.asarray(canvas.marks.resize((SIDE, SIDE), Image.Resampling.NEAREST))
        if _is_seen(scene, np.bincount(marks.ravel(), minlength=16)):
            return np.asarray(canvas.picture.resize((SIDE, SIDE), Image.Resampling.BOX)), marks
    raise RuntimeError(f"no places found at which everything is seen: {caption(scene)}")


def _is_seen(scene: Scene, pixels: Array) -> bool:
    wanted = {_MARKS["tree"] + i: LEAST_SEEN["tree"] for i in range(scene.trees[1] if scene.trees else 0)}
    told = vars(scene)
    wanted |= {mark: LEAST_SEEN[name] for name, mark in _MARKS.items() if name != "tree" and told[name]}
    return all(pixels[mark] >= least for mark, least in wanted.items())


class _Canvas:
    """A picture, and beside it the marks of what was painted last at each place."""

    def __init__(self, sky: Array) -> None:
        self.picture = Image.fromarray(sky.astype(np.uint8))
        self.marks = Image.new("L", self.picture.size)
        self._draws = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.marks)

    def polygon(self, points: Points, colour: Array, mark: int = 0) -> None:
        scaled = [(x * SIDE * FINE, y * SIDE * FINE) for x, y in points]
        for draw, fill in zip(self._draws, (_rgb(colour), mark), strict=True):
            draw.polygon(scaled, fill=fill)

    def box(self, x: float, y: float, half_width: float, height: float, colour: Array, mark: int = 0) -> None:
        """A rectangle that stands on y."""
        left, right = x - half_width, x + half_width
        self.polygon([(left, y - height), (right, y - height), (right, y), (left, y)], colour, mark)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Array, mark: int = 0) -> None:
        scaled = [v * SIDE * FINE for v in (x - rx, y - ry, x + rx, y + ry)]
        for draw, fill in zip(self._draws, (_rgb(colour), mark), strict=True):
            draw.ellipse(scaled, fill=fill)

    def crescent(self, x: float, y: float, radius: float, away: float, colour: Array) -> None:
        """A disc without the part under a second disc, which lies `away` to the right."""
        cut = Image.new("L", self.picture.size)
        draw = ImageDraw.Draw(cut)
        for centre, fill in ((x, 255), (x + away, 0)):
            corners = (centre - radius, y - radius, centre + radius, y + radius)
            draw.ellipse([v * SIDE * FINE for v in corners], fill=fill)
        self.picture.paste(_rgb(colour), mask=cut)

    def shaded(self, points: Points, paint: Array) -> None:
        """A polygon cut out of a whole painting. Shapes: paint (SIDE * FINE, SIDE * FINE, 3)."""
        cut = Image.new("L", self.picture.size)
        ImageDraw.Draw(cut).polygon([(x * SIDE * FINE, y * SIDE * FINE) for x, y in points], fill=255)
        self.picture.paste(Image.fromarray(np.clip(paint, 0, 255).astype(np.uint8)), mask=cut)
        self.marks.paste(0, mask=cut)


@dataclass(frozen=True)
class _Ridge:
    """The outline of a range of hills, as heights over evenly spaced x."""

    y: Array

    def at(self, x: float) -> float:
        return float(np.interp(x, np.linspace(0, 1, len(self.y)), self.y))

    def below(self) -> Points:
        return [(0.0, 1.0), *zip(np.linspace(0, 1, len(self.y)).tolist(), self.y.tolist(), strict=True), (1.0, 1.0)]


def _paint(scene: Scene, rng: np.random.Generator) -> _Canvas:
    light = LIGHTS[scene.time]
    top, low, tint = np.array(light.top, float), np.array(light.low, float), np.array(light.tint)
    horizon = rng.uniform(0.46, 0.56)
    down = (_grid() / horizon).clip(0, 1)[:, None, None]
    sky = np.broadcast_to(top * (1 - down) + low * down, (SIDE * FINE, SIDE * FINE, 3)).copy()
    sun_x = rng.uniform(0.12, 0.88)
    canvas = _sky(scene, light, sky, horizon, sun_x, rng)
    if scene.mountains:
        _mountains(canvas, light, horizon, sun_x, rng)
    ridges = [_ridge(rng, horizon + below, high) for below, high in ((0.0, 0.035), (0.12, 0.032), (0.25, 0.025))]
    # The house and every tree get a strip of their own, so that none hides another.
    strips = rng.permutation((scene.trees[1] if scene.trees else 0) + (scene.house is not None))
    places = [(strip + rng.uniform(0.4, 0.6)) / len(strips) * 0.88 + 0.06 for strip in strips]
    if scene.balloon:
        _balloon(canvas, scene, tint, horizon, sun_x, rng)
    for layer, ridge in enumerate(ridges):
        haze = (0.34, 0.13, 0.0)[layer]
        colour = np.array(GROUNDS[scene.ground]) * tint * (0.78, 0.90, 1.02)[layer] * (1 - haze) + low * haze * 0.9
        canvas.shaded(ridge.below(), _slopes(ridge, colour, sun_x))
        if layer == 1 and scene.house:
            x = places.pop()
            _house(canvas, scene, light, x, ridge.at(x) + 0.035, rng)
    if scene.lake:
        _lake(canvas, scene, light, ridges[2], sun_x, rng)
    for number, x in enumerate(places):
        _tree(canvas, scene, tint, x, ridges[2].at(x) + rng.uniform(0.0, 0.03), number, rng)
    return canvas


def _sky(scene: Scene, light: Light, sky: Array, horizon: float, sun_x: float, rng: np.random.Generator) -> _Canvas:
    """The sky with a sun that glows, or a moon with its phase and stars, and clouds."""
    night = scene.time == "at night"
    sun_y = {
        "at dawn": horizon - rng.uniform(0.06, 0.14),
        "at noon": rng.uniform(0.11, 0.2),
        "at sunset": horizon - rng.uniform(0.03, 0.1),
        "at night": rng.uniform(0.11, 0.24),
    }[scene.time]
    x, y = _grid()[None, :] - sun_x, _grid()[:, None] - sun_y
    glow = (0.2 if night else 0.5) * np.exp(-np.hypot(x, y) / (2.2 * light.radius))[..., None]
    canvas = _Canvas(sky * (1 - glow) + np.array(light.sun) * glow)
    if night:
        for _ in range(int(rng.integers(12, 22))):
            size = rng.uniform(0.006, 0.009)
            canvas.ellipse(rng.uniform(0, 1), rng.uniform(0, horizon), size, size, np.array((222, 226, 240)))
        canvas.crescent(sun_x, sun_y, light.radius, rng.uniform(0.5, 1.1) * light.radius, np.array(light.sun))
    else:
        canvas.ellipse(sun_x, sun_y, light.radius, light.radius, np.array(light.sun))
    if scene.clouds:
        white = 0.3 * np.array(light.low) + 0.7 * 250 * np.array(light.tint)
        for i in range(count := int(rng.integers(2, 4))):
            cx, cy, size = (i + rng.uniform(0.2, 0.8)) / count, rng.uniform(0.07, 0.26), rng.uniform(0.055, 0.075)
            for k in range(4):
                puff = size * rng.uniform(0.65, 1)
                canvas.ellipse(cx + (k - 1.5) * size * 0.85, cy, puff, puff * 0.6, white, _MARKS["clouds"])
    return canvas


def _mountains(canvas: _Canvas, light: Light, horizon: float, sun_x: float, rng: np.random.Generator) -> None:
    """Two or three peaks, each with a side towards the sun, a side away from it, and snow on both."""
    low, tint = np.array(light.low), np.array(light.tint)
    rock = 0.62 * np.array((98, 106, 132)) * tint + 0.38 * low
    snow = np.array((246, 248, 252)) * (0.3 + 0.7 * tint)
    for k in range(count := int(rng.integers(2, 4))):
        x, high, wide = (k + rng.uniform(0.25, 0.75)) / count, rng.uniform(0.2, 0.32), rng.uniform(0.22, 0.32)
        peak, foot, ragged = horizon - high + 0.04, horizon + 0.1, rng.uniform(0.02, 0.05) * wide
        rise = foot - peak
        for side in (-1, 1):
            shade = 1.06 if (sun_x - x) * side > 0 else 0.84
            canvas.polygon([(x, peak), (x + side * wide, foot), (x, foot)], rock * shade, _MARKS["mountains"])
            cap = [(x, peak), (x + side * wide * 0.32, peak + rise * 0.32)]
            cap += [(x + side * wide * 0.16, peak + rise * 0.27), (x + side * ragged, peak + rise * 0.36), (x, peak)]
            canvas.polygon(cap, snow * (0.88 + 0.12 * (shade > 1)), _MARKS["mountains"])


def _balloon(
    canvas: _Canvas, scene: Scene, tint: Array, horizon: float, sun_x: float, rng: np.random.Generator
) -> None:
    """A hot-air balloon with a lighter panel, away from the sun."""
    assert scene.balloon is not None
    x = rng.uniform(0.14, 0.86)
    if abs(x - sun_x) < 0.24:
        x = sun_x + (0.28 if sun_x < 0.5 else -0.28)
    y, r, mark = rng.uniform(0.13, horizon - 0.26), 0.078, _MARKS["balloon"]
    colour = np.array(HOUSES[scene.balloon]) * _lit(tint)
    canvas.polygon([(x - r * 0.86, y + r * 0.5), (x + r * 0.86, y + r * 0.5), (x + r * 0.2, y + r * 1.5),
                    (x - r * 0.2, y + r * 1.5)], colour, mark)  # fmt: skip
    canvas.ellipse(x, y, r, r, colour, mark)
    canvas.ellipse(x, y, r * 0.36, r, colour * 0.8 + 51, mark)
    canvas.box(x, y + r * 2.0, r * 0.26, r * 0.4, np.array((120, 80, 50)) * _lit(tint), mark)


def _house(canvas: _Canvas, scene: Scene, light: Light, x: float, y: float, rng: np.random.Generator) -> None:
    """A house with a roof, a door, a window that is lit but at noon, and snow on the roof in snowy hills."""
    assert scene.house is not None
    u, mark, tint = 0.08 * rng.uniform(0.95, 1.1), _MARKS["house"], _lit(np.array(light.tint))
    wall, y = np.array(HOUSES[scene.house]) * tint, y + 0.25 * u
    roof = np.array((92, 60, 52)) * tint
    canvas.box(x + u * 0.6, y - u * 1.5, u * 0.13, u * 0.75, roof * 0.8, mark)
    canvas.box(x, y, u, u * 1.35, wall, mark)
    gable, eaves = y - u * 2.2, y - u * 1.25
    canvas.polygon([(x - u * 1.2, eaves), (x + u * 1.2, eaves), (x, gable)], roof, mark)
    if scene.ground == "snowy hills":
        white = np.array((240, 244, 250)) * tint
        canvas.polygon([(x - u * 1.2, eaves), (x, gable), (x + u * 1.2, eaves), (x, gable + u * 0.4)], white, mark)
    canvas.box(x + u * 0.42, y - u * 0.5, u * 0.25, u * 0.5, np.array(light.windows), mark)
    canvas.box(x - u * 0.38, y, u * 0.24, u * 0.85, np.array((84, 54, 42)) * tint, mark)


def _lake(canvas: _Canvas, scene: Scene, light: Light, ridge: _Ridge, sun_x: float, rng: np.random.Generator) -> None:
    """A lake in front that mirrors the sky, with a lighter shore, ripples, and the sun's glitter under the sun."""
    x, rx, ry = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.4), rng.uniform(0.052, 0.066)
    y, mark = ridge.at(x) + 0.135, _MARKS["lake"]
    top, low, tint = np.array(light.top), np.array(light.low), np.array(light.tint)
    water = 0.62 * (0.6 * top + 0.4 * low) + 0.38 * np.array((58, 116, 190)) * (0.3 + 0.7 * tint)
    canvas.ellipse(x, y, rx + 0.012, ry + 0.01, np.array(GROUNDS[scene.ground]) * tint * 0.72)
    canvas.ellipse(x, y, rx, ry, water, mark)
    for k in range(4):  # bands that grow lighter towards the far shore, as the low sky does
        canvas.ellipse(x, y - ry * (0.16 + 0.15 * k), rx * (0.9 - 0.17 * k), ry * (0.72 - 0.16 * k),
                       water * (1 - 0.09 * (k + 1)) + low * 0.09 * (k + 1), mark)  # fmt: skip
    if abs(sun_x - x) < rx * 0.7:
        for k in range(4):
            half = 0.055 - 0.009 * k
            canvas.box(sun_x + rng.uniform(-0.01, 0.01), y + ry * (0.7 - 0.4 * k), half, 0.009,
                       0.45 * water + 0.55 * np.array(light.sun), mark)  # fmt: skip


def _tree(
    canvas: _Canvas, scene: Scene, tint: Array, x: float, y: float, number: int, rng: np.random.Generator
) -> None:
    """A pine of three tiers or an oak of three crowns; snow lies on it in snowy hills, and golden hills are autumn."""
    assert scene.trees is not None
    h, mark, lit = rng.uniform(0.23, 0.28), _MARKS["tree"] + number, 0.3 + 0.7 * tint
    snow = np.array((240, 244, 250)) * lit
    canvas.box(x, y, h * 0.05, h * 0.4, np.array((100, 68, 44)) * lit, mark)
    if scene.trees[0] == "pine":
        for k in range(3):
            half, foot = h * (0.3 - 0.07 * k), y - h * (0.18 + 0.24 * k)
            tip = foot - h * 0.42
            needles = np.array((30, 92, 62)) * lit * (0.88 + 0.14 * k)
            canvas.polygon([(x - half, foot), (x + half, foot), (x, tip)], needles, mark)
            if scene.ground == "snowy hills":
                canvas.polygon([(x - half * 0.5, foot - h * 0.21), (x, tip), (x + half * 0.5, foot - h * 0.21),
                                (x, foot - h * 0.27)], snow, mark)  # fmt: skip
        return
    leaves = np.array((212, 96, 36) if scene.ground == "golden hills" else (84, 136, 46)) * lit
    crowns = ((-0.14, 0.54, 0.18), (0.14, 0.54, 0.18), (0.0, 0.74, 0.22))
    for dx, up, r in crowns:
        canvas.ellipse(x + dx * h, y - up * h, r * h, r * h, leaves, mark)
    canvas.ellipse(x - 0.05 * h, y - 0.8 * h, 0.13 * h, 0.11 * h, leaves * 0.85 + 38, mark)  # light on the crown
    if scene.ground == "snowy hills":
        for dx, up, r in crowns:
            canvas.ellipse(x + dx * h, y - (up + 0.55 * r) * h, r * 0.72 * h, r * 0.42 * h, snow, mark)


def _ridge(rng: np.random.Generator, base: float, high: float, points: int = 64) -> _Ridge:
    """An outline around `base` of five sine waves, at most 1.5 `high` away from it."""
    x, y, stretch = np.linspace(0, 1, points), np.zeros(points), rng.uniform(0.6, 1.3)
    for k in range(1, 6):
        y += rng.normal() * np.sin(2 * np.pi * (k * x * stretch + rng.random())) / k**1.4
    return _Ridge(base + high * np.clip(y, -1.5, 1.5))


def _slopes(ridge: _Ridge, colour: Array, sun_x: float) -> Array:
    """Hills lighter where they face the sun and darker towards their feet. Shapes: -> (SIDE * FINE, SIDE * FINE, 3)."""
    x = _grid()
    outline = np.interp(x, np.linspace(0, 1, len(ridge.y)), ridge.y)
    facing = np.clip(np.gradient(outline, x) * np.sign(x - sun_x + 1e-9), -0.5, 0.5)  # y points down
    deep = np.clip(x[:, None] - outline[None, :], 0, 0.35)
    return colour * ((1 + 0.3 * facing[None, :] * np.exp(-deep / 0.05)) * (1 - 0.35 * deep))[..., None]


def _grid() -> Array:
    """The middles of the fine pixels. Shapes: -> (SIDE * FINE,)."""
    return (np.arange(SIDE * FINE) + 0.5) / (SIDE * FINE)


def _lit(tint: Array) -> Array:
    """Houses and balloons keep half of their own colour at any time, so that it can be told."""
    return 0.5 + 0.5 * tint


def _rgb(colour: Array) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(colour, 0, 255))
