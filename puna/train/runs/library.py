"""The runs of this machine: listed, found by name, removed."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from puna.errors import TrainingError
from puna.train.runs.folder import runs_home
from puna.train.runs.run import EVENTS, LOCK, METRICS, RECIPE, RECORD, REPORT, STATES, Run


def list_runs(home: Path | None = None, notify: Callable[[str], None] = lambda message: None) -> list[Run]:
    """Those in ``home`` (default: ``runs_home()``), the newest first. A damaged one is told to ``notify``, left out."""
    home = home or runs_home()
    found = []
    for path in sorted(home.glob(f"*/{RECORD}")):
        if path.parent.name.startswith("."):
            continue  # half written, or half removed
        try:
            found.append(Run.read(path.parent))
        except TrainingError as error:
            notify(str(error))
    return sorted(found, key=lambda run: (run.record.starts[0].time, run.name), reverse=True)


def find_run(text: str) -> Run:
    """The run that ``text`` means: a run's name, a folder's path, or the newest run of what the user named so.

    Raises TrainingError that names the nearest.
    """
    for folder in (runs_home() / text, Path(text).expanduser()):
        if text and (folder / RECORD).is_file():
            return Run.read(folder.absolute())
    runs = list_runs()
    for run in runs:
        if run.record.inputs.name == text:
            return run
    names = [run.name for run in runs] + [run.record.inputs.name for run in runs]
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]}?" if near else "`puna runs` lists them"
    raise TrainingError(f"no training run {text!r}; {hint}")


def remove_run(run: Run) -> None:
    """Delete what Puna keeps of a run. Anything else in its folder stays, and the folder with it.

    Raises TrainingError where a process trains in it, or the disk refuses.
    """
    if run.busy:
        raise TrainingError(f"{run.folder} is being trained in now; stop that first")
    try:
        # Renamed first, so that a run that is half removed is never taken for one.
        doomed = run.folder.with_name(f".{run.folder.name}.{uuid4().hex[:8]}.removed")
        run.folder.rename(doomed)
        for name in (RECORD, RECIPE, METRICS, REPORT, LOCK):
            (doomed / name).unlink(missing_ok=True)
        for name in (EVENTS, STATES):
            shutil.rmtree(doomed / name, ignore_errors=True)
        if any(doomed.iterdir()):
            doomed.rename(run.folder)
        else:
            doomed.rmdir()
    except OSError as error:
        raise TrainingError(f"{run.folder} cannot be removed: {error}") from None
