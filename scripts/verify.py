"""Does a picture show its prompt? Read off the pixels by rules that know the world, but not the generator.

`read` says what is in a picture, `check` compares that with a scene attribute by attribute, `score` adds up.
`--validate` measures the rules themselves, on rendered scenes; without it, pictures of a model are measured.

Units: pixels of a 128-pixel image, x to the right, y down; colour differences in steps of 0 ... 255.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import scene_at
from world import (
    COLOURS,
    DISTANCES,
    RELATIONS,
    SIZES,
    STRIPE_PERIOD,
    Array,
    Object,
    Scene,
    _stripe_colour,
    caption,
    parse_caption,
    render,
)

KINDS = ("background", "count", "shape", "colour", "size", "fill", "relation")
ATTRIBUTES = ("shape", "colour", "size", "fill")  # of one object
UNCLEAR = "unclear"  # a colour too far from the whole palette

FOREGROUND = 30.0  # colour difference from the background and all its shadows that makes a pixel foreground
DARKEST_SHADOW = 0.68  # of the background's brightness
SPECK = 60  # pixels; the smallest object covers 220
COLOUR_REACH = 75.0  # largest difference from a palette colour that may still be called by its name
STRIPE_CONTRAST = 14.0  # least amplitude of stripes; the faintest true ones have 48 before any blur
STRIPE_SHARE = 0.3  # least share of the colour variance inside an object that stripes have to explain
BETWEEN_SIZES = (SIZES["small"][1] + SIZES["large"][0]) / 2
EXPECTED_DISTANCE = 60.0  # least distance of two objects along their relation's axis in the world


@dataclass(frozen=True)
class Found:
    """An object seen in a picture: x, y its centre, area in square pixels."""

    shape: str
    colour: str
    size: str
    fill: str
    x: float
    y: float
    area: int


@dataclass(frozen=True)
class Reading:
    background: str
    objects: tuple[Found, ...]  # from the largest to the smallest


def read(image: Array) -> Reading:
    """What a picture shows. Shapes: image (H, W, 3) uint8."""
    pixels = image.astype(np.float32)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[6:-6, 6:-6] = False
    middle = np.median(pixels[border], axis=0)
    strength = _strength(pixels, _background(pixels, border, middle))
    parts = [part for part in _components(_close(strength > FOREGROUND)) if part.sum() >= SPECK]
    found = sorted((_look(pixels, strength, part) for part in parts), key=lambda o: -o.area)
    return Reading(_name_plain(middle), tuple(found))


def check(image: Array, scene: Scene) -> dict[str, bool]:
    """Which attributes of a scene's caption a picture shows.

    Keys: background, count, relation if there is one, and shape_i, colour_i, size_i, fill_i of object i. The objects
    seen are given to the objects told in the way that makes most attributes right, and the relation is judged then;
    where two ways are equal, the one that keeps the relation counts.
    """
    return compare(read(image), scene)


def score(images: Iterable[Array], scenes: Iterable[Scene]) -> dict[str, float]:
    """The fraction right of each kind of attribute, of all attributes, and of prompts with everything right."""
    return _summary([check(image, scene) for image, scene in zip(images, scenes, strict=True)])


def follow(images: Iterable[Array], prompts: Iterable[str]) -> list[float | None]:
    """The share of what each plain caption tells that its image shows; None for other prompts."""
    scenes = [parse_caption(prompt) for prompt in prompts]
    checks = [scene and check(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return [sum(c.values()) / len(c) if c else None for c in checks]


# --- what is there ---------------------------------------------------------------------------------------------------


def _background(pixels: Array, border: Array, middle: Array) -> Array:
    """A smooth surface under the picture, from the border inwards. Shapes: border (H, W), middle (3,) -> (H, W, 3)."""
    height, width = border.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    surface = np.broadcast_to(middle, pixels.shape)
    for reach in (60, 30, 20, 15):  # what the surface explains joins in; shadows and objects stay out
        known = np.linalg.norm(pixels - surface, axis=-1) < reach
        if reach == 60:
            known &= border
        known[1::2] = False  # every other row will do
        if known.sum() < 100:
            break
        coefficients, *_ = np.linalg.lstsq(basis[known], pixels[known], rcond=None)
        surface = basis @ coefficients
    return surface


def _strength(pixels: Array, background: Array) -> Array:
    """How far each pixel is from its background in any shadow. Shapes: (H, W, 3) twice -> (H, W)."""
    along = (pixels * background).sum(-1) / np.maximum((background**2).sum(-1), 1)
    shadow = np.clip(along, DARKEST_SHADOW, 1)[..., None] * background
    return np.linalg.norm(pixels - shadow, axis=-1)


def _components(mask: Array) -> list[Array]:
    """Connected parts of a mask, over edges and corners: union-find over the runs of each row."""
    runs: list[tuple[int, int, int]] = []  # row, first column, column after the last
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    above: list[int] = []
    steps = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    for row, step in enumerate(steps):
        here = []
        for start, stop in zip(np.flatnonzero(step > 0), np.flatnonzero(step < 0), strict=True):
            here.append(len(runs))
            parent.append(len(runs))
            runs.append((row, start, stop))
            for other in above:
                if runs[other][1] <= stop and start <= runs[other][2]:
                    parent[root(other)] = root(here[-1])
        above = here
    parts: dict[int, Array] = defaultdict(lambda: np.zeros_like(mask))
    for i, (row, start, stop) in enumerate(runs):
        parts[root(i)][row, start:stop] = True
    return list(parts.values())


def _grow(mask: Array) -> Array:
    """The mask and its eight neighbours."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    grown = wide.copy()
    grown[:, 1:] |= wide[:, :-1]
    grown[:, :-1] |= wide[:, 1:]
    return grown


def _shrink(mask: Array) -> Array:
    return ~_grow(~mask)


def _close(mask: Array) -> Array:
    """Close gaps of up to two pixels, which a stripe that resembles the background may leave."""
    return mask | _shrink(_grow(mask))


# --- what it is ------------------------------------------------------------------------------------------------------


def _look(pixels: Array, strength: Array, part: Array) -> Found:
    """One object, from the part of the picture it covers. Shapes: pixels (H, W, 3), strength and part (H, W)."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    top, left = max(rows[0] - 4, 0), max(columns[0] - 4, 0)
    crop = np.s_[top : rows[-1] + 5, left : columns[-1] + 5]
    pixels, strength, part = pixels[crop], strength[crop], part[crop]
    core = next(m for m in (_shrink(_shrink(part)), _shrink(part), part) if m.sum() >= 40)
    # An edge lies where half of the object's contrast is reached, however blurred it is. Stripes have contrasts of
    # their own, and run along the diagonals on which x + y is constant.
    diagonal = np.add.outer(np.arange(part.shape[0]), np.arange(part.shape[1]))
    count = np.bincount(diagonal[core], minlength=diagonal.max() + 1)
    total = np.bincount(diagonal[core], strength[core], diagonal.max() + 1)
    contrast = np.where(count > 0, total / np.maximum(count, 1), strength[core].mean())[diagonal]
    shape, x, y, radius = _fit(_close(part & (strength > np.maximum(FOREGROUND, 0.5 * contrast))))
    fill, colour = _paint(pixels, core)
    size = "large" if radius > BETWEEN_SIZES else "small"
    return Found(shape, colour, size, fill, float(left + x), float(top + y), int(part.sum()))


def _paint(pixels: Array, core: Array) -> tuple[str, str]:
    """Fill and colour. Stripes are a wave along the diagonal, of about the known period, that explains the colours."""
    inside = pixels[core]
    y, x = (c.astype(np.float32) for c in np.nonzero(core))
    flat = np.stack([np.ones_like(x), x - x.mean(), y - y.mean()], axis=1)  # a bevel is a slope
    level = inside - flat @ np.linalg.lstsq(flat, inside, rcond=None)[0]
    best = (0.0, 0.0, x)
    for stretch in (0.85, 1.0, 1.15):
        phase = 2 * np.pi * (x + y) / (np.sqrt(2) * STRIPE_PERIOD * stretch)
        waves = np.stack([np.sin(phase), np.cos(phase)], axis=1)
        # Regress on the part of the waves that no slope explains.
        waves -= flat @ np.linalg.lstsq(flat, waves, rcond=None)[0]
        weights, *_ = np.linalg.lstsq(waves, level, rcond=None)
        share = 1 - float(((level - waves @ weights) ** 2).sum() / max((level**2).sum(), 1e-3))
        along = np.linalg.svd(weights)[2][0]  # the colour direction in which the stripes differ
        best = max(best, (share, float(np.linalg.norm(weights @ along)), waves @ weights @ along), key=lambda b: b[0])
    share, contrast, wave = best
    if contrast < STRIPE_CONTRAST or share < STRIPE_SHARE:
        return "plain", _name_plain(np.median(inside, axis=0))
    return "striped", _name_striped(np.median(inside[wave > 0], axis=0), np.median(inside[wave <= 0], axis=0))


def _name_plain(rgb: Array) -> str:
    return _nearest({name: _difference(rgb, np.array(c)) for name, c in COLOURS.items()})


def _name_striped(one: Array, other: Array) -> str:
    """The colour whose two tones, in either order, are nearest to the two tones seen."""
    differences = {}
    for name, base in COLOURS.items():
        second = _stripe_colour(name)
        orders = ((one, other), (other, one))
        differences[name] = min((_difference(a, np.array(base)) + _difference(b, second)) / 2 for a, b in orders)
    return _nearest(differences)


def _difference(one: Array, other: Array) -> float:
    """Distance of two colours in which brightness counts half, since light and bevel change it."""
    change = np.asarray(one, dtype=float) - other
    return float(np.linalg.norm(change - 0.5 * change.mean()))


def _nearest(differences: dict[str, float]) -> str:
    name = min(differences, key=differences.__getitem__)
    return name if differences[name] < COLOUR_REACH else UNCLEAR


REACH, CELLS = 1.25, 201  # the templates span -REACH ... REACH in units of an object's radius
_GRID = np.linspace(-REACH, REACH, CELLS)


def _worn(distance: Array, blur: float = 0.14) -> Array:
    """The distance to a silhouette whose tips and notches a blur has rounded. Units: blur in radii of the object."""
    frequency = np.fft.fftfreq(CELLS, _GRID[1] - _GRID[0])
    kernel = np.exp(-2 * (np.pi * blur * frequency) ** 2)
    cover = np.fft.ifft2(np.fft.fft2(distance < 0) * kernel * kernel[:, None]).real
    return (0.5 - cover) * blur * np.sqrt(2 * np.pi)  # exact at a straight edge


@dataclass(frozen=True)
class _Template:
    shape: str
    distance: Array  # (CELLS, CELLS), negative inside
    area: float  # for radius 1
    drop: float  # how far the centre of mass lies below the centre, for radius 1


def _templates() -> Iterator[_Template]:
    """Every shape twice: sharp and worn."""
    for shape, function in DISTANCES.items():
        sharp = function(*np.meshgrid(_GRID, _GRID))
        for distance in (sharp, _worn(sharp)):
            rows, _ = np.nonzero(distance < 0)
            area = len(rows) * (_GRID[1] - _GRID[0]) ** 2
            yield _Template(shape, distance.astype(np.float32), float(area), float(_GRID[rows].mean()))


_TEMPLATES = tuple(_templates())


def _fit(mask: Array) -> tuple[str, float, float, float]:
    """The shape, centre and radius whose silhouette overlaps a mask best. Shapes: mask (H, W)."""
    rows, columns = np.nonzero(mask)
    area, x, y = len(rows), columns.mean() + 0.5, rows.mean() + 0.5
    starts = []
    for template in _TEMPLATES:
        radius = np.sqrt(area / template.area)
        place = np.array([x, y - template.drop * radius, radius])
        starts.append((_overlap(mask, template, place), template, place))
    starts.sort(key=lambda s: -s[0])
    _, template, place = max((_climb(mask, *start) for start in starts[:5]), key=lambda s: s[0])
    return template.shape, float(place[0]), float(place[1]), float(place[2])


def _climb(mask: Array, overlap: float, template: _Template, place: Array) -> tuple[float, _Template, Array]:
    """Move centre and radius, one at a time, while that gains overlap; in ever smaller steps."""
    for step in (1.5, 0.5):
        for _ in range(3):
            before = overlap
            for move in step * np.concatenate([np.eye(3), -np.eye(3)]):
                if (gained := _overlap(mask, template, place + move)) > overlap:
                    overlap, place = gained, place + move
            if overlap == before:
                break
    return overlap, template, place


def _overlap(mask: Array, template: _Template, place: Array) -> float:
    """Intersection over union of a mask with an anti-aliased silhouette; place is x, y and radius in pixels."""
    x, y, radius = place
    scale = (CELLS - 1) / (2 * REACH)
    columns, rows = (
        (((np.arange(n) + 0.5 - c) / radius + REACH) * scale + 0.5).astype(int).clip(0, CELLS - 1)
        for n, c in ((mask.shape[1], x), (mask.shape[0], y))
    )
    cover = (0.5 - template.distance[rows[:, None], columns] * np.float32(radius)).clip(0, 1)
    both = float(cover[mask].sum())
    return both / (float(cover.sum()) + float(mask.sum()) - both)


# --- what was told ---------------------------------------------------------------------------------------------------


def compare(seen: Reading, scene: Scene) -> dict[str, bool]:
    """`check` for a picture that has been read already."""
    told = scene.objects
    # Objects that were not seen are None; assignments come in the order of `told`.
    pool = [*seen.objects, *[None] * len(told)]
    ways = [_judge(told, way, scene.relation) for way in itertools.permutations(pool, len(told))]
    best = max(ways, key=lambda way: (sum(v for k, v in way.items() if k != "relation"), way.get("relation", False)))
    return {"background": seen.background == scene.background, "count": len(seen.objects) == len(told), **best}


def _judge(told: Sequence[Object], seen: Sequence[Found | None], relation: str | None) -> dict[str, bool]:
    """The attributes of each object told in the object seen that it was given."""
    right = {
        f"{attribute}_{i}": s is not None and getattr(t, attribute) == getattr(s, attribute)
        for i, (t, s) in enumerate(zip(told, seen, strict=True))
        for attribute in ATTRIBUTES
    }
    if relation is not None:
        first, second = seen
        right["relation"] = first is not None and second is not None and _holds(relation, first, second)
    return right


def _holds(relation: str, first: Found, second: Found) -> bool:
    dx, dy = first.x - second.x, first.y - second.y
    ax, ay = RELATIONS[relation]
    along, across = dx * ax + dy * ay, dx * ay - dy * ax
    return along >= EXPECTED_DISTANCE / 2 and along > abs(across)


def _summary(checks: Sequence[dict[str, bool]]) -> dict[str, float]:
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for key, value in itertools.chain.from_iterable(c.items() for c in checks):
        by_kind[key.split("_")[0]].append(value)
    table = {kind: float(np.mean(values)) for kind, values in by_kind.items() if values}
    table["attributes"] = float(np.mean([v for values in by_kind.values() for v in values]))
    table["prompts"] = float(np.mean([all(c.values()) for c in checks]))
    return table


# --- command line ----------------------------------------------------------------------------------------------------


def degrade(image: Array, blur: float, noise: float, rng: np.random.Generator) -> Array:
    """Gaussian blur of a standard deviation in pixels, then noise of one in 0 ... 255. Shapes: (H, W, 3) uint8."""
    pixels = image.astype(np.float32)
    if blur > 0:
        reach = int(np.ceil(3 * blur))
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / blur) ** 2)
        for axis in (0, 1):
            padded = np.pad(pixels, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
            shifts = (np.take(padded, range(i, i + pixels.shape[axis]), axis) for i in range(len(kernel)))
            pixels = sum(w * s for w, s in zip(kernel / kernel.sum(), shifts, strict=True))
    pixels = pixels + noise * rng.standard_normal(pixels.shape)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _generate(args: argparse.Namespace, scenes: Sequence[Scene]) -> list[Array]:
    """A picture for each scene's plain caption, seeded by its number."""
    import minireuse  # here, so that --validate does without torch
    from minireuse.search import build, policies_for

    pipe = minireuse.load(args.model)
    folder = None if args.model is None else Path(args.model)  # where searched plans may lie
    policies = policies_for(args.policy, folder, "ddim", lambda: pipe.fingerprint)
    plan = build(args.policy, pipe.calls("ddim", args.steps), pipe.sites, policies=policies)
    images: list[Array] = []
    for start in tqdm(range(0, len(scenes), 10), desc="generate"):
        prompts = [caption(scene) for scene in scenes[start : start + 10]]
        seeds = list(range(start, start + len(prompts)))
        settings = {"steps": args.steps, "guidance_scale": args.guidance_scale, "plan": plan}
        images += list(pipe.generate(prompts, seeds=seeds, **settings).images)
    return images


def _save_grid(images: Sequence[Array], path: Path, columns: int = 10) -> None:
    missing = -len(images) % columns
    tiles = np.stack([*images, *[np.zeros_like(images[0])] * missing])
    rows = tiles.reshape(-1, columns, *tiles.shape[1:]).transpose(0, 2, 1, 3, 4)
    Image.fromarray(rows.reshape(rows.shape[0] * rows.shape[1], -1, 3)).save(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validate", action="store_true", help="measure the rules on rendered scenes instead")
    parser.add_argument("--blur", type=float, default=0.0, help="with --validate: blur the scenes, pixels")
    parser.add_argument("--noise", type=float, default=0.0, help="with --validate: add noise, steps of 0 to 255")
    parser.add_argument("--model", metavar="PATH", help="a folder or file; default: the model of the package")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--policy", default="none", help="which U-Net calls reuse: none, hurry, interval, ...")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="where to write the pictures, ten in a row")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the scores and what was wrong")
    args = parser.parse_args(argv)

    scenes = [scene_at(9 if args.validate else 5, i) for i in range(args.scenes)]
    if args.validate:
        rng = np.random.default_rng(9)
        images = [degrade(render(scene), args.blur, args.noise, rng) for scene in tqdm(scenes, desc="render")]
    else:
        images = _generate(args, scenes)
    checks = [check(image, scene) for image, scene in zip(tqdm(images, desc="verify"), scenes, strict=True)]
    table = _summary(checks)
    for name, value in table.items():
        print(f"{name:<12}{value:8.4f}")
    if args.grid:
        _save_grid(images, args.grid)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("grid", "out")}
        wrong = {i: [k for k, v in c.items() if not v] for i, c in enumerate(checks) if not all(c.values())}
        args.out.write_text(json.dumps({**settings, "scores": table, "wrong": wrong}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
