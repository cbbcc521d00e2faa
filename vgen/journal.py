"""A journal: results by key, each safe on the disk when it is made, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgen.files import explained, make_folder


class Journal:
    """Results by key in a file to which each is added as it is made; one that was being written is lost, no other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        with explained(f"open {path}"):
            make_folder(path.parent)
            data = path.read_bytes() if path.exists() else b""
            sound = data.rfind(b"\n") + 1
            if sound < len(data):
                os.truncate(path, sound)
        for line in data[:sound].decode(errors="replace").splitlines():
            try:
                told = json.loads(line)
                self.known[told["key"]] = told["value"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that a failing disk left; it is made again

    def once(self, told: Any, make: Callable[[], Any]) -> Any:
        """The value that belongs to the plain value `told`, made if it is not there."""
        key = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]
        if key not in self.known:
            value = make()
            with explained(f"write {self.path}"), self.path.open("ab") as file:
                file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self.known[key] = value
        return self.known[key]
