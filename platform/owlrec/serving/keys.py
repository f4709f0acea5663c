"""API keys: several with names, stored as salted hashes, compared in constant time, changed without a restart.

A key file has one line per key, as `owlrec keys NAME` prints it; lines that start with # are comments:

    name salt hash scopes=lookup,rank [rate=200] [expires=2027-01-31]

Keys are 256 random bits, so one round of SHA-256 is enough: nobody can guess them. To rotate a key, add the
new line, switch the clients, remove the old line; servers notice within a second. A rate is counted by each replica
for itself.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from owlrec.errors import ServingError, did_you_mean

Scope = Literal["lookup", "rank", "explore", "admin"]  # applications that a key opens; admin opens all of them
SCOPES: tuple[Scope, ...] = get_args(Scope)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE = re.compile(
    rf"(?P<name>{_NAME.pattern})\s+(?P<salt>[0-9a-f]{{32}})\s+(?P<digest>[0-9a-f]{{64}})(?P<rest>(?:\s+[a-z]+=\S+)*)"
)
_OPTIONS = ("scopes", "rate", "expires")
_LOOK_AGAIN_S = 1.0
_LONGEST_KEY = 200  # limit for clients, since hashing is not free

_log = logging.getLogger("owlrec.serving")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as the server stores it: enough to recognize it, too little to use it."""

    name: str
    salt: bytes
    digest: bytes
    scopes: frozenset[Scope]
    rate: float | None = None  # requests/s per replica; None = unlimited
    expires: float | None = None  # seconds since 1970; None = never

    def opens(self, scope: Scope) -> bool:
        """Whether requests of this scope are allowed."""
        return scope in self.scopes or "admin" in self.scopes

    @property
    def expired(self) -> bool:
        """Whether the day from which it is invalid has begun (UTC)."""
        return self.expires is not None and time.time() >= self.expires


def new_key(
    name: str, scopes: Collection[str] = ("lookup",), *, rate: float | None = None, expires: str | None = None
) -> tuple[str, str]:
    """A new key: (the key itself, for the client; the line for the key file).

    rate: requests/s. expires: the first day on which it is invalid, YYYY-MM-DD. Raises ServingError for a name, a
    scope or an option that is not allowed in a key file.
    """
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"'{name}' is not a valid key name. Use up to 64 letters, digits, dots, dashes and underscores."
        )
    key, salt = f"owl_{secrets.token_urlsafe(32)}", secrets.token_bytes(16)
    options = [f"scopes={','.join(dict.fromkeys(scopes))}"]
    options += [f"rate={rate:g}"] if rate is not None else []
    options += [f"expires={expires}"] if expires is not None else []
    line = f"{name} {salt.hex()} {_digest(salt, key).hex()} {' '.join(options)}"
    parse_keys(line, f"key '{name}'")
    return key, line


def parse_keys(text: str, source: str) -> list[StoredKey]:
    """Keys from the lines of a key file. source: its name in errors.

    Raises ServingError for an invalid line (without quoting it, since it may be a secret), and for a duplicate
    name.
    """
    keys: list[StoredKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        where = f"{source}, line {number}"
        match = _LINE.fullmatch(line)
        if match is None:
            raise ServingError(
                f"{where}: invalid line. A line must be `name salt hash scopes=…`, as `owlrec keys NAME` prints it."
            )
        if any(key.name == match["name"] for key in keys):
            raise ServingError(f"{where}: the name '{match['name']}' occurs twice. Rename one key.")
        options = dict(option.split("=", 1) for option in match["rest"].split())
        salt, digest = bytes.fromhex(match["salt"]), bytes.fromhex(match["digest"])
        keys.append(StoredKey(match["name"], salt, digest, **_options(options, where)))
    return keys


def _options(options: dict[str, str], where: str) -> dict[str, Any]:
    """The fields of a line's options. Raises ServingError, naming the option."""
    for name in options:
        if name not in _OPTIONS:
            raise ServingError(f"{where}: there is no option '{name}'.{did_you_mean(name, _OPTIONS)}")
    scopes = options.get("scopes", "").split(",")
    for scope in scopes:
        if scope not in SCOPES:
            raise ServingError(f"{where}: '{scope}' is not a scope. Write scopes={','.join(SCOPES)} or fewer.")
    fields: dict[str, Any] = {"scopes": frozenset(scopes)}
    if "rate" in options:
        try:
            fields["rate"] = float(options["rate"])
        except ValueError:
            fields["rate"] = 0.0
        if not 0 < fields["rate"] < 1e9:
            raise ServingError(f"{where}: the rate is not a number above 0. Write the requests per second, rate=200.")
    if "expires" in options:
        try:
            day = date.fromisoformat(options["expires"])
        except ValueError:
            raise ServingError(f"{where}: 'expires' is not a day. Write expires=2027-01-31.") from None
        fields["expires"] = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
    return fields


class KeyRing:
    """The currently valid keys. An empty one without a source admits everybody; see `required`."""

    def __init__(self, file: str | os.PathLike[str] | None = None, text: str | None = None) -> None:
        """file: a key file, reloaded when it changes. text: the lines themselves, if there is no file.

        Raises ServingError if the file cannot be read or has no keys, and the errors of parse_keys.
        """
        self._file = Path(file) if file is not None else None
        self._stamp: tuple[int, int, int] | None = None
        self._next_look = 0.0
        self._keys: list[StoredKey] = []
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, and when that was counted
        self.required = self._file is not None or text is not None
        if self._file is not None:
            self._keys = self._read()
        elif text is not None:
            self._keys = parse_keys(text, "OWLREC_API_KEYS")
        if self.required and not self._keys:
            raise ServingError(f"{self._file or 'OWLREC_API_KEYS'}: has no keys. Create one with `owlrec keys NAME`.")

    def find(self, key: str) -> StoredKey | None:
        """The stored key, even if it has expired; None if `key` is not or no longer in the file.

        Takes the same time for a wrong key as for a right one.
        """
        self._look_again()
        found = None
        if len(key) > _LONGEST_KEY:
            return None
        for stored in self._keys:  # compares all of them for constant time
            if hmac.compare_digest(_digest(stored.salt, key), stored.digest):
                found = stored
        return found

    def wait_s(self, key: StoredKey) -> float:
        """Takes one request off a key's rate: 0, or the seconds until the next one is allowed.

        A token bucket of one second's requests, at least one.
        """
        if key.rate is None:
            return 0.0
        now, size = time.monotonic(), max(1.0, key.rate)
        left, before = self._buckets.get(key.name, (size, now))
        left = min(size, left + (now - before) * key.rate)
        if left < 1:
            self._buckets[key.name] = left, now
            return (1 - left) / key.rate
        self._buckets[key.name] = left - 1, now
        return 0.0

    def _look_again(self) -> None:
        now = time.monotonic()
        if self._file is None or now < self._next_look:
            return
        self._next_look = now + _LOOK_AGAIN_S
        try:
            status = os.stat(self._file)
            if (status.st_mtime_ns, status.st_size, status.st_ino) != self._stamp:
                self._keys = self._read()
                _log.info("reloaded key file %s: %d keys", self._file, len(self._keys))
        except (OSError, ServingError) as error:
            # A typo must not lock out all clients. An empty file does: it revokes every key.
            _log.error("key file %s cannot be used, the previous keys stay valid: %s", self._file, error)

    def _read(self) -> list[StoredKey]:
        assert self._file is not None
        try:
            status = os.stat(self._file)
            keys = parse_keys(self._file.read_text(encoding="utf-8"), str(self._file))
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(
                f"key file {self._file} cannot be read ({error}). Create one with `owlrec keys`."
            ) from None
        self._stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        return keys


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode("utf-8", "surrogatepass")).digest()
