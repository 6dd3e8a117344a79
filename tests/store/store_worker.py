"""What the tests of several processes run in a process of their own: ``store_worker.py VERB ARGUMENTS…``."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from puna.llm.create import create
from puna.quantize import quantizer
from puna.store import Silent, Store, import_file, pull
from puna.store.lock import file_lock

# What the operating system is asked to do to the store between two states that a kill could leave behind.
CHANGES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "open"}


def say(text: str) -> None:
    print(text, flush=True)


class Spoken(Silent):
    def status(self, text: str) -> None:
        say(text)


def kill_at(number: int, home: Path) -> None:
    """Die, as by kill -9, just before the given one of this process's changes below ``home``."""
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not any(str(home) in str(a) for a in arguments[:2]):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def die_everywhere(
    action: Callable[[Store], None], check: Callable[[Store], None], prepare: Callable[[], Store]
) -> int:
    """Run ``action`` in forks that die at the first, second, … change, until one survives; ``check`` what each left."""
    number = 0
    while True:
        number += 1
        store = prepare()
        child = os.fork()
        if child == 0:
            try:
                kill_at(number, store.home)
                action(store)
                os._exit(0)
            except BaseException as error:
                say(f"error in the child: {error!r}")
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit(1)
            check(store)
            return number - 1
        check(store)


def check_invariants(store: Store) -> None:
    """Whatever happened: every listed model is whole, and garbage is collected to exactly what is referenced."""
    told: list[str] = []
    store = Store(store.home, notify=told.append)
    names = {manifest.model_name for manifest in store.models()}
    assert store.verify() == [], names
    assert all(store.path_of(manifest).exists() for manifest in store.models())
    store.collect_garbage()
    assert {manifest.model_name for manifest in store.models()} == names
    assert store.verify() == []
    referenced = {f"sha256-{file.sha256}" for manifest in store.models() for file in manifest.files}
    assert {path.name for path in store.blobs.folder.glob("*")} == referenced
    views = {path.name for path in (store.home / "views").glob("*")}
    assert views == {manifest.content_digest for manifest in store.models()}
    assert not told, told


def die_everywhere_in(verb: str, folder: Path) -> int:
    """Kill ``verb`` (import, copy, replace, remove, quantize) at each of its changes; then it must still succeed."""
    count = 0

    def prepare() -> Store:
        nonlocal count
        count += 1
        store = Store(folder / f"home{count}", notify=lambda message: None)
        import_file(folder / "old.gguf", "old", store=store, copy=True)
        return store

    def action(store: Store) -> None:
        if verb == "import":
            import_file(folder / "new", "new", store=store)
        elif verb == "copy":
            import_file(folder / "new", "new", store=store, copy=True)
        elif verb == "replace":
            import_file(folder / "new", "old", store=store, replace=True)
        elif verb == "remove":
            store.remove("old")
        elif verb == "quantize":
            create(store, "new", from_=folder / "new" / "tiny.gguf", quantize=quantizer("Q8_0", threads=1))

    def check(store: Store) -> None:
        check_invariants(store)
        old = {m.model_name.name: m for m in store.models()}.get("old")
        if verb in ("import", "copy", "quantize"):
            assert old is not None
        if verb == "replace":  # at any moment the name means the one or the other
            assert old is not None
        if verb != "remove" or old is not None:
            action(store)
        check_invariants(store)

    return die_everywhere(action, check, prepare)


def main(verb: str, *arguments: str) -> None:
    if verb == "lock":
        with file_lock(Path(arguments[0]), lambda: say("waiting")):
            say("locked")
            sys.stdin.readline()
    elif verb == "pull":
        pull(arguments[0], name=arguments[1], progress=Spoken())
        say("pulled")
    elif verb == "churn":
        # Add and remove models that share bytes, as fast as possible, for others to meet.
        store = Store(notify=lambda message: None)
        for _ in range(int(arguments[2])):
            import_file(arguments[0], arguments[1], store=store, copy=True)
            store.remove(arguments[1])
        say("churned")
    elif verb == "die":
        say(str(die_everywhere_in(arguments[0], Path(arguments[1]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
