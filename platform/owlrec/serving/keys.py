"""API keys: several with names, stored as salted hashes, compared in constant time, changed without a restart.

A key file has one line per key, `name salt hash`, as `owlrec keys NAME` prints it; lines that start with # are
comments. Keys are 256 random bits, so one round of SHA-256 is enough: there is no password to guess. To rotate a
key, add the new line, switch the clients, remove the old line; servers notice within a second.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from owlrec.errors import ServingError

_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+(?P<salt>[0-9a-f]{32})\s+(?P<digest>[0-9a-f]{64})")
_LOOK_AGAIN_S = 1.0
_LONGEST_KEY = 200  # limit for clients, since hashing is not free

_log = logging.getLogger("owlrec.serving")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as the server stores it: enough to recognize it, too little to use it."""

    name: str
    salt: bytes
    digest: bytes


def new_key(name: str) -> tuple[str, str]:
    """A new key: (the key itself, for the client; the line for the key file).

    Raises ServingError for a name that is not allowed in a key file.
    """
    key, salt = f"owl_{secrets.token_urlsafe(32)}", secrets.token_bytes(16)
    line = f"{name} {salt.hex()} {_digest(salt, key).hex()}"
    if not _LINE.fullmatch(line):
        raise ServingError(
            f"'{name}' is not a valid key name. Use up to 64 letters, digits, dots, dashes and underscores."
        )
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
        match = _LINE.fullmatch(line)
        if match is None:
            raise ServingError(
                f"{source}, line {number}: invalid line. A line must be `name salt hash`, as `owlrec keys "
                "NAME` prints it."
            )
        if any(key.name == match["name"] for key in keys):
            raise ServingError(f"{source}, line {number}: the name '{match['name']}' occurs twice. Rename one key.")
        keys.append(StoredKey(match["name"], bytes.fromhex(match["salt"]), bytes.fromhex(match["digest"])))
    return keys


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
        self.required = self._file is not None or text is not None
        if self._file is not None:
            self._keys = self._read()
        elif text is not None:
            self._keys = parse_keys(text, "OWLREC_API_KEYS")
        if self.required and not self._keys:
            raise ServingError(f"{self._file or 'OWLREC_API_KEYS'}: has no keys. Create one with `owlrec keys NAME`.")

    def name_of(self, key: str) -> str | None:
        """Name of `key`, None if it is not or no longer valid.

        Takes the same time for a wrong key as for a right one.
        """
        self._look_again()
        name = None
        if len(key) > _LONGEST_KEY:
            return None
        for stored in self._keys:  # compares all of them for constant time
            if hmac.compare_digest(_digest(stored.salt, key), stored.digest):
                name = stored.name
        return name

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
