"""``puna serve`` as a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any


class ServeProcess:
    """Runs until the block ends; ``url`` is where it says that it serves."""

    def __init__(self, home: Path, *options: str, **environment: str) -> None:
        self.environment = {**os.environ, "PUNA_HOME": str(home), **environment}
        self._command = [sys.executable, "-m", "puna", "serve", "--port", "0", *options]

    def __enter__(self) -> ServeProcess:
        self._errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self._command, env=self.environment, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"Puna serves on (https?://\S+)\n", line)
        assert found, f"{line!r}: {self.errors()}"
        self.url = found[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, and give its exit code."""
        self.process.send_signal(sign)
        return self.process.wait(timeout=60)

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def log(self) -> list[dict[str, Any]]:
        """The lines of its log so far, all of them JSON."""
        return [json.loads(line) for line in self.errors().splitlines()]
