"""Reading JSON of strangers field by field, each of the kind and within the range that is expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from minireuse.files import shown


class ConfigError(ValueError):
    """A configuration this package cannot build: the message says which key, what was expected, and what to do."""


def repeated(value: Any) -> Any:
    """The one value that a list gives for every level of a network; anything else as it is."""
    if not isinstance(value, list) or not value or isinstance(value[0], (list, dict)):
        return value
    return value[0] if all(type(v) is type(value[0]) and v == value[0] for v in value) else value


class Reader:
    """Typed look-ups in one JSON object, remembering which keys were used.

    optional: keys in which null means the same as no key. Any other null is a value, as it is to diffusers.
    """

    def __init__(self, raw: Mapping[str, Any], source: str, optional: Collection[str] = ()) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source} holds {type(raw).__name__}, expected a JSON object")
        self.raw = {key: value for key, value in raw.items() if value is not None or key not in optional}
        self.source, self.used = source, set[str]()

    def _get(self, key: str, default: Any) -> Any:
        self.used.add(key)
        return self.raw.get(key, default)

    def require(self, condition: bool, key: str, expected: str) -> None:
        if not condition:
            got = self.raw.get(key)
            raise ConfigError(
                f"{self.source}: {key[:80]} is {'null' if got is None else shown(got)}, expected {expected}; "
                "only Stable Diffusion 1.x, 2.x and XL text-to-image models are supported"
            )

    def integer(self, key: str, default: int, least: int = 1, most: int = 65536) -> int:
        value = repeated(self._get(key, default))
        valid = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        self.require(valid, key, f"a whole number from {least} to {most}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6
        self.require(valid, key, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        self.require(value is None or isinstance(value, bool), key, "true or false")
        return bool(value)

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self._get(key, default)
        self.require(value in allowed, key, "one of " + ", ".join(allowed))
        return str(value)

    def ints(self, key: str, default: tuple[int, ...], length: int | None = None) -> tuple[int, ...]:
        value = self._get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and length:
            value = (value,) * length  # diffusers allows one number for all levels
        valid = (
            isinstance(value, (list, tuple))
            and 1 <= len(value) <= 8
            and all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= 65536 for v in value)
        )
        self.require(valid, key, "a list of positive whole numbers")
        self.require(length is None or len(value) == length, key, f"{length} numbers, one per level")
        return tuple(value)

    def strings(self, key: str, default: tuple[str, ...], length: int) -> tuple[str, ...]:
        value = self._get(key, default)
        self.require(isinstance(value, (list, tuple)) and len(value) == length, key, f"{length} names, one per level")
        return tuple(str(v) for v in value)

    def finish(self, fixed: Mapping[str, Any], unused: Collection[str]) -> None:
        """Refuse what would change the network.

        fixed: the only value built here, for keys that may have others. unused: keys that change nothing.
        """
        for key, value in self.raw.items():
            if key in self.used or key in unused or key.startswith("_"):
                continue
            one = repeated(value)
            if key in fixed:
                off = one is None and fixed[key] is False
                self.require(off or one == fixed[key], key, repr(fixed[key]))
            else:  # a switch of a newer diffusers, harmless as long as it is off
                self.require(one is None or one is False, key, "no such key, or null")
