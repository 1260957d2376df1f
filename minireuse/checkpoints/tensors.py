"""The tensors of safetensors files, and giving each parameter of a module its own: strictly, one for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minireuse.files import parse_json, read_text

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
Taken = tuple[int, int] | Literal["transposed"]  # of a fused tensor, which of how many equal parts; or its transpose
Target = tuple[str, Taken | None]  # a name here, and what of the tensor goes there; None is the whole


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the message says which file, what is wrong with it, and what to do."""


CONVERT = (
    "pickles can run code and are not read: load it with a trusted tool and save it as .safetensors "
    "(diffusers: pipeline.save_pretrained(folder, safe_serialization=True))"
)


@dataclass(frozen=True)
class Source:
    """One tensor of a file, not yet read."""

    file: Any  # open: reading the header again for each of a thousand tensors would take seconds
    path: Path
    key: str
    shape: tuple[int, ...]
    taken: Taken | None = None  # such as (0, 3), the first third of a fused projection

    def read(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.key)
        if self.taken is None:
            return tensor
        if self.taken == "transposed":
            return tensor.T.contiguous() if tensor.ndim == 2 else tensor
        number, parts = self.taken
        return torch.atleast_1d(tensor).tensor_split(parts)[number]


def open_file(path: Path) -> dict[str, Source]:
    """The tensors of a safetensors file; only its header is read. Raises: CheckpointError."""
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle by its name; {CONVERT}")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the download may be incomplete")
    try:
        file = safe_open(str(path), framework="pt")
        return {key: Source(file, path, key, tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        # Looked at only now: a valid file may begin with these bytes too, which are the length of its header.
        with path.open("rb") as raw:
            start = raw.read(2)
        if start == b"PK" or (start[:1] == b"\x80" and start[1:] <= b"\x05"):
            raise CheckpointError(f"{path} is a pickle by its content; {CONVERT}") from None
        raise CheckpointError(f"{path} is not a valid safetensors file ({reason(error)}); download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); check its permissions") from None


def fill(
    module: nn.Module,
    sources: Iterable[tuple[str, Source]],
    where: Path,
    dtype: torch.dtype,
    names: Callable[[str], list[Target]] = lambda key: [(key, None)],
    why: str = "the config describes another model",
) -> None:
    """Give every parameter of `module` its tensor.

    names: where the tensor of a key goes, for the keys of the file and of the module; nowhere, if it is not needed.
    why: what is likely where tensors are missing, unknown or mis-shaped.
    Raises: CheckpointError for missing, extra or mis-shaped ones.
    """
    wanted = {names(key)[0][0]: (key, tensor) for key, tensor in module.state_dict().items()}
    given: dict[str, Source] = {}
    for key, source in sources:
        for name, taken in names(key):
            part = replace(source, taken=taken)
            if name in given and not _same(given[name], part):
                both = f"{given[name].key} and {source.key}, two names of the same tensor, with different values"
                raise CheckpointError(f"{where} holds {both}; save or convert the model again, with one of them")
            given.setdefault(name, part)
    if len(files := {source.path for source in given.values()}) == 1:
        where = files.pop()
    complain(f"{where} lacks", set(wanted) - set(given), f"it is incomplete, or {why}")
    complain(f"{where} has unknown", [given[key].key for key in set(given) - set(wanted)], why)
    state: dict[str, Tensor] = {}
    mis_shaped = []
    for key, (own_key, parameter) in wanted.items():
        tensor = given[key].read()
        if _pointwise(tensor.shape) == _pointwise(parameter.shape):
            tensor = tensor.reshape(parameter.shape)
        if tensor.shape != parameter.shape:
            mis_shaped.append(f"{given[key].key} {tuple(tensor.shape)} instead of {tuple(parameter.shape)}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {given[key].key} is {tensor.dtype}; quantized weights are not supported")
        state[own_key] = tensor.to(dtype)
        if not torch.isfinite(state[own_key]).all():
            raise CheckpointError(f"{where}: {given[key].key} holds NaN, inf, or numbers beyond {dtype}; load another")
    complain(f"{where} has mis-shaped", mis_shaped, why)
    module.load_state_dict(state, assign=True)


def _same(one: Source, other: Source) -> bool:
    """Whether two tensors hold the same numbers, be they matrices or 1x1 convolutions."""
    return torch.equal(one.read().flatten(), other.read().flatten())


def _pointwise(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the matrix that a 1x1 convolution is; any other shape as it is."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape


def complain(what: str, keys: Iterable[str], why: str) -> None:
    if names := sorted(keys):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(f"{what} {', '.join(name[:200] for name in names[:3])}{more}; {why}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(read_text(path))
    except OSError:
        raise CheckpointError(f"{path} is missing or unreadable; is this a complete diffusers folder?") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, expected a JSON object; download it again")
    return data


def reason(error: Exception) -> str:
    """The first line of an error, for a message of one sentence: without the file that it may quote."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
