"""What a run paints, and how: from the command line, or from a PNG that is to be made again."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from minireuse.checkpoints.lora import find_lora
from minireuse.common.options import CACHE_DTYPES, grid
from minireuse.devices import is_available, pick_device
from minireuse.files import digest_of, read_lines
from minireuse.pipeline import ATTENTIONS
from minireuse.sample.options import sample_parser
from minireuse.sample.recipe import SHIPPED, Recipe, from_png, versions
from minireuse.samplers import SAMPLERS
from minireuse.search import takes_sites

# What may be given beside --from-png: where things lie, and what is done with the picture.
FREE = {"from_png", "out", "overwrite", "json", "quiet", "device", "model", "tokenizer"}
FREE |= {"save_maps", "compare", "dry_run"}
FREE |= {"compile"}  # where nothing can be compiled now
FREE |= {"init_image", "lora"}  # they may lie elsewhere now, but have to be the same ones


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is painted.

    jobs: prompts and seeds. wanted: the numbers of the jobs whose pictures are written.
    steps: how many, or the timesteps themselves. spacing: of them; None is the model's own.
    guidance_scale, clip_skip: None is the model's own. height, width: None is what the model was trained at.
    reuse: the number of calls that reuse; sites, kind: what reuses, and whose maps are saved; latency: for `phast`, the
    most that the plan may take of the full sampler's time. None of these is the policy's own.
    recipe: what a PNG says it was made from, where one is made again.
    """

    jobs: tuple[tuple[str, int], ...]
    wanted: tuple[int, ...]
    batch_size: int
    negative_prompt: str | None
    sampler: str
    steps: int | tuple[float, ...]
    spacing: str | None
    guidance_scale: float | None
    guidance_rescale: float
    eta: float
    height: int | None
    width: int | None
    init_image: Path | None
    strength: float
    attention: str
    compile: bool
    policy: str
    reuse: int | None
    sites: str | None
    kind: str | None
    latency: float | None
    cache_dtype: str
    model: Path | None
    loras: tuple[str, ...]
    tokenizer: str | None
    prediction_type: str | None
    device: str
    dtype: str
    clip_skip: int | None = None
    recipe: Recipe | None = None

    @property
    def model_name(self) -> str:
        return SHIPPED if self.model is None else str(self.model)

    @property
    def batches(self) -> list[tuple[tuple[str, int], ...]]:
        """The jobs, as many at a time as are sampled together."""
        return [self.jobs[i : i + self.batch_size] for i in range(0, len(self.jobs), self.batch_size)]


def read_settings(args: argparse.Namespace) -> Settings:
    """What the arguments ask for. Raises: ValueError, OSError for what makes no sense."""
    settings = _asked(args) if args.from_png is None else _made_again(args)
    if args.save_maps is not None and args.save_maps.exists() and any(args.save_maps.iterdir()):
        raise ValueError(f"--save-maps {args.save_maps} is not empty; name a new folder")
    if args.save_maps is not None and settings.compile:
        raise ValueError("--save-maps cannot see maps inside compiled graphs; leave out --save-maps or --compile")
    if args.compare and (args.dry_run or args.save_maps is not None):
        other = "--dry-run" if args.dry_run else "--save-maps"
        raise ValueError(f"--compare times a run as it usually is, and {other} makes it another; leave out one of both")
    if args.dry_run and args.cache_budget is not None:
        raise ValueError("--cache-budget needs the model's weights and --dry-run does not read them; leave out one")
    if settings.batch_size < 1:
        raise ValueError(f"--batch-size is {settings.batch_size}, expected 1 or more")
    for name, known in (("sampler", SAMPLERS), ("cache_dtype", CACHE_DTYPES), ("attention", ATTENTIONS)):
        if getattr(settings, name) not in known:  # a file may say anything
            raise ValueError(f"{name} is {getattr(settings, name)!r}, expected one of {', '.join(known)}")
    return settings


def _asked(args: argparse.Namespace) -> Settings:
    jobs = tuple(itertools.product(_prompts(args), _seeds(args)))
    # With --save-maps, --sites says what to save, whatever the policy reuses.
    given = args.kind is not None or (args.sites is not None and args.save_maps is None)
    if given and not takes_sites(args.policy):
        raise ValueError(f"--policy {args.policy} has its own sites; leave out --kind and --sites")
    return Settings(
        jobs=jobs,
        wanted=tuple(range(len(jobs))),
        batch_size=args.batch_size,
        negative_prompt=args.negative_prompt,
        sampler=args.sampler,
        steps=grid(args),
        spacing=args.spacing,
        guidance_scale=args.guidance_scale,
        guidance_rescale=args.guidance_rescale,
        eta=args.eta,
        height=args.height,
        width=args.width,
        init_image=args.init_image,
        strength=args.strength,
        attention=args.attention,
        compile=bool(args.compile),
        policy=args.policy,
        reuse=args.reuse,
        sites=args.sites,
        kind=args.kind,
        latency=args.latency,
        cache_dtype=args.cache_dtype,
        model=args.model,
        loras=tuple(args.lora or ()),
        tokenizer=args.tokenizer,
        prediction_type=args.prediction_type,
        device=args.device,
        dtype=args.dtype,
        clip_skip=args.clip_skip,
    )


def _made_again(args: argparse.Namespace) -> Settings:
    """What `--from-png` was made with; a note on stderr says what differs this time."""
    defaults = sample_parser()
    given = [name for name, value in vars(args).items() if name not in FREE and value != defaults.get_default(name)]
    if given:
        raise ValueError(f"--from-png takes everything from the file; leave out --{given[0].replace('_', '-')}")
    recipe, made_with = from_png(args.from_png)
    differs: list[tuple[str, str]] = []  # how the file was made, and what this run does instead
    if made_with != versions():
        differs.append((f"with {made_with}", f"uses {versions()}"))
    device = args.device
    if device == "auto" and re.fullmatch(r"cpu|mps|cuda(:\d+)?", recipe.device) and is_available(recipe.device):
        device = recipe.device
    elif device != recipe.device:
        found = pick_device(device) if device == "auto" else device
        differs.append((f"on {recipe.device}", f"runs on {found}"))
    compiles = recipe.compile if args.compile is None else bool(args.compile)
    if compiles != recipe.compile:
        to_plain, to_compiled = ("with --compile", "does not compile"), ("without --compile", "compiles")
        differs.append(to_plain if recipe.compile else to_compiled)
    if bool(recipe.watched) != (args.save_maps is not None):
        to_plain, to_saving = ("with --save-maps", "saves no maps"), ("without --save-maps", "saves maps")
        was, does = to_plain if recipe.watched else to_saving
        differs.append((was, f"{does}, so another kernel computes them"))
    if differs:
        made, now = zip(*differs, strict=True)
        note = f"the file was made {' '.join(made)}; this run {' and '.join(now)}; pixels may differ"
        print(f"note: {note}", file=sys.stderr)
    if not recipe.digests:
        older = "of version 0.1, which knows another model by its U-Net alone"
        note = f"{args.from_png} is {older}; where another part has changed, so have the pixels"
        print(f"note: {note}", file=sys.stderr)
    return Settings(
        jobs=recipe.jobs,
        wanted=(recipe.place,),
        batch_size=len(recipe.jobs),
        negative_prompt=recipe.negative_prompt,
        sampler=recipe.sampler,
        steps=recipe.steps,
        spacing=recipe.spacing or None,
        guidance_scale=recipe.guidance_scale,
        guidance_rescale=recipe.guidance_rescale,
        eta=recipe.eta,
        height=recipe.height,
        width=recipe.width,
        init_image=_same_image(args, recipe),
        strength=recipe.strength,
        attention=recipe.attention,
        compile=compiles,
        policy=recipe.policy,
        reuse=None,
        sites=recipe.watched or None,
        kind=None,
        latency=None,
        cache_dtype=recipe.cache_dtype,
        model=Path(recipe.model) if args.model is None and recipe.model != SHIPPED else args.model,
        loras=_same_loras(args, recipe),
        tokenizer=args.tokenizer,
        prediction_type=recipe.prediction_type,
        device=device,
        dtype=recipe.dtype,
        clip_skip=recipe.clip_skip,
        recipe=recipe,
    )


def _same_image(args: argparse.Namespace, recipe: Recipe) -> Path | None:
    """The initial image that the PNG was made from. Raises: ValueError where there is another one, or none."""
    if not recipe.init_image:
        if args.init_image is not None:
            raise ValueError(f"{args.from_png} began with noise; leave out --init-image")
        return None
    path, digest = recipe.init_image
    found: Path = args.init_image or Path(path)
    if not found.is_file() or digest_of(found) != digest:
        advice = "put it back, or say with --init-image where it is"
        raise ValueError(f"{args.from_png} began with the image {path}, which is gone or has changed; {advice}")
    return found


def _same_loras(args: argparse.Namespace, recipe: Recipe) -> tuple[str, ...]:
    """The LoRAs that the PNG was made with. Raises: ValueError where there are others, or none."""
    expected = [f"{path}:{strength}" for path, strength, _ in recipe.loras]
    texts = tuple(args.lora or expected)
    found = [(lora.strength, lora.digest) for lora in map(find_lora, texts)]
    if found != [(strength, digest) for _, strength, digest in recipe.loras]:
        made_with = f"was made with --lora {' '.join(expected)}" if expected else "was made without a LoRA"
        given = f"--lora {' '.join(texts)} gives other files or strengths" if args.lora else "a file has changed"
        raise ValueError(f"{args.from_png} {made_with}, but {given}; say with --lora where the same files are")
    return texts


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompts_file is not None:
        prompts += read_lines(args.prompts_file)
    if not prompts:
        raise ValueError('no prompt given; use --prompt "green hills at noon" or --prompts-file FILE')
    return prompts


def _seeds(args: argparse.Namespace) -> list[int]:
    if args.num_images < 1:
        raise ValueError(f"--num-images is {args.num_images}, expected 1 or more")
    if len(args.seed) > 1 and args.num_images > 1:
        raise ValueError("several seeds and --num-images were given; use one seed with --num-images, or seeds alone")
    for seed in args.seed:
        if not 0 <= seed < 2**63:
            raise ValueError(f"--seed is {seed}, expected 0 to 2^63 - 1")
    return args.seed if len(args.seed) > 1 else [args.seed[0] + i for i in range(args.num_images)]
