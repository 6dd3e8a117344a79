"""Prefixes on disk: found again by another engine, never wrong, bounded, private."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_weights, tiny_config

from puna.engine import Engine, Event, PrefixCache, Request, SamplingParams, Speculation, Timings
from puna.errors import RequestError
from puna.model.model import Model
from puna.ops.registry import OPS, make_ops

SIZE = 4  # tokens of a block
FILE_BYTES = 52 + 4 * SIZE + 16 * SIZE + 32  # header, tokens, the fake cache's block, checksum
PROMPT = list(range(1, 23))  # 5 full blocks and 2 tokens
GREEDY = SamplingParams(temperature=0, max_tokens=3)


def new_engine(
    folder: Path | None, *, files: int = 1000, model: str = "m", fake: FakeModel | None = None, **options: Any
):
    cache = None if folder is None else PrefixCache(folder, model, files * FILE_BYTES)
    return Engine(fake or FakeModel(), **{"num_blocks": 32, "block_size": SIZE} | options, prefix_cache=cache)


def answer(engine: Engine, prompt: list[int], salt: str = "", params: SamplingParams = GREEDY) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were not computed."""
    stream = engine.submit(Request(prompt, params, cache_salt=salt))
    tokens = [event.token for event in stream if event.token is not None]
    return tokens, stream.timings.cached_tokens


def once(folder: Path | None, prompt: list[int] = PROMPT, **options: Any) -> tuple[list[int], int]:
    return answer(new_engine(folder, **options), prompt)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_another_engine_finds_prompt_and_answer(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    expected, cached = once(None)
    assert (once(folder), cached) == ((expected, 0), 0)
    assert len(files_of(folder)) == 6  # 22 + 3 tokens, the last of which was never computed
    assert {file.stat().st_size for file in files_of(folder)} == {FILE_BYTES}
    fake = FakeModel()
    assert once(folder, fake=fake) == (expected, 20)
    assert fake.steps[0] == [2]
    assert once(folder, [*PROMPT, *expected, 9])[1] == 24
    assert once(folder, PROMPT[:20])[1] == 16, "the last token's logits are needed"
    assert once(folder, [*PROMPT[:9], 0, *PROMPT[10:]])[1] == 8


def test_what_memory_holds_is_continued_from_disk(tmp_path: Path) -> None:
    expected = once(tmp_path / "cache")[0]
    fake = FakeModel()
    engine = new_engine(tmp_path / "cache", fake=fake)
    assert answer(engine, PROMPT[:9])[1] == 8
    assert answer(engine, PROMPT) == (expected, 20)
    assert answer(engine, PROMPT) == (expected, 20)
    assert engine.scheduler.pool.available == engine.scheduler.pool.num_blocks


def test_only_what_is_the_same_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert answer(new_engine(folder), PROMPT, "mine")[1] == 0
    assert answer(new_engine(folder), PROMPT, "mine")[1] == 20
    assert answer(new_engine(folder), PROMPT, "yours")[1] == 0
    assert once(folder)[1] == 0
    assert once(folder, model="other")[1] == 0
    assert once(folder, block_size=2)[1] == 0
    assert once(folder, fake=FakeModel(context_length=63))[1] == 0, "another configuration"
    assert once(folder)[1] == 20


@given(data=st.data())
def test_damaged_files_are_ignored_and_removed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "cache"
    expected = once(folder)[0]
    victim = data.draw(st.sampled_from(files_of(folder)))
    good = victim.read_bytes()
    kind = data.draw(st.sampled_from(["truncated", "longer", "flipped", "anything"]))
    if kind == "truncated":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "longer":
        bad = good + data.draw(st.binary(min_size=1, max_size=200))
    elif kind == "flipped":
        place = data.draw(st.integers(0, len(good) - 1))
        bad = good[:place] + bytes([good[place] ^ 1 << data.draw(st.integers(0, 7))]) + good[place + 1 :]
    else:
        bad = data.draw(st.binary(min_size=len(good), max_size=len(good)))
    victim.write_bytes(bad)
    longer = [*PROMPT, *expected, 7]
    fresh = once(None, longer)[0]
    tokens, cached = once(folder, longer)
    assert tokens == fresh
    assert cached < 24
    assert cached % SIZE == 0
    assert victim.read_bytes() == good, "removed, computed and saved again"
    assert once(folder, longer) == (fresh, 24)


def test_files_under_foreign_names_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    expected = once(folder)[0]
    contents = [file.read_bytes() for file in files_of(folder)]
    for file, content in zip(files_of(folder), contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    # Each request removes and saves the first one that is wrong.
    assert [once(folder) for _ in range(6)] == [(expected, cached) for cached in (0, 4, 8, 12, 16, 20)]


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "cache"
    expected = once(folder)[0]
    for number, file in enumerate(files_of(folder)):
        elsewhere = tmp_path / str(number)
        file.rename(elsewhere)
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to(elsewhere)
    assert once(folder) == (expected, 0)
    assert len(list(tmp_path.iterdir())) == 7, "what a link leads to stays"


def test_the_bound_holds_and_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    prompts = [[n, *PROMPT[1:9]] for n in range(1, 6)]  # two full blocks each, and room for three of them
    for prompt in prompts[:3]:
        once(folder, prompt, files=6)
    assert once(folder, prompts[0], files=6)[1] == 8  # used again: now the second is the oldest
    once(folder, prompts[3], files=6)
    assert len(files_of(folder)) == 6
    assert [once(folder, prompts[n], files=6)[1] for n in (0, 2, 3)] == [8, 8, 8]
    assert once(folder, prompts[1], files=6)[1] == 0
    once(folder, prompts[4], files=3)  # a smaller bound
    assert len(files_of(folder)) == 3


def test_of_a_long_prefix_the_first_blocks_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    once(folder, files=3)
    assert len(files_of(folder)) == 3
    assert once(folder, files=3)[1] == 12
    assert once(folder, files=3)[1] == 12


def test_a_full_disk_costs_only_the_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    engine = new_engine(folder)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("puna.engine.prefix_files.os.replace", full)
        with pytest.warns(UserWarning, match=r"not saved in .*cache: No space left on device; free some space"):
            assert answer(engine, PROMPT) == once(None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one warning is enough
            answer(engine, [5, *PROMPT])
    assert files_of(folder) == []
    answer(engine, PROMPT)
    assert len(files_of(folder)) == 6, "saved once there is room"


def test_a_folder_that_vanishes_costs_only_the_saving(tmp_path: Path) -> None:
    engine = new_engine(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    with pytest.warns(UserWarning, match="are not saved"):
        assert answer(engine, PROMPT) == once(None)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_only_the_owner_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    before = os.umask(0)
    try:
        once(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in files_of(folder)} == {0o600}
    folder.chmod(0o750)
    with pytest.raises(RequestError, match=r"can be read by other users.*chmod 700"):
        new_engine(folder)


def test_folders_and_sizes_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"cache_size must be at least {FILE_BYTES} bytes, .* found 0"):
        new_engine(tmp_path / "cache", files=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be used"):
        new_engine(tmp_path / "file")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    once(folder, files=2)
    (folder / "notes.txt").write_text("x" * 10_000)
    (folder / f"{'0' * 64}.kv.bak").write_text("mine")
    once(folder, [8, 9, 10, 11, 12], files=2)
    assert (folder / "notes.txt").exists()
    assert (folder / f"{'0' * 64}.kv.bak").exists()
    assert once(folder, [8, 9, 10, 11, 12], files=2)[1] == 4


PROGRAM = """
import os, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_prefix_store as t
from puna.engine import prefix_files
folder, first = Path(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "die":
    prefix_files.os.replace = lambda *_: os._exit(9)
print("ready", flush=True)
sys.stdin.readline()
for n in range(first, first + 40):
    prompt = [n % 8, *t.PROMPT[1:]]
    assert t.once(folder, prompt, files=20)[0] == t.once(None, prompt)[0]
"""


def start(folder: Path, first: int, how: str = "live") -> subprocess.Popen[str]:
    here = Path(__file__).resolve().parent
    code = PROGRAM.format(paths=[str(here), str(here.parent), str(here.parent.parent)])
    command = [sys.executable, "-c", code, str(folder), str(first), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    processes = [start(folder, 0), start(folder, 4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # both are ready: they begin together
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert 0 < len(files_of(folder)) <= 20
    assert {file.suffix for file in files_of(folder)} == {".kv"}
    assert {file.stat().st_size for file in files_of(folder)} == {FILE_BYTES}


def test_killed_before_the_rename(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    process = start(folder, 1, "die")
    process.communicate("go\n")
    assert process.returncode == 9
    [partial] = files_of(folder)
    assert partial.name.endswith(".partial")
    assert once(folder) == once(None)
    assert partial.exists(), "its writer may be alive"
    long_ago = time.time() - 7200
    os.utime(partial, (long_ago, long_ago))
    assert once(folder)[1] == 20
    assert not partial.exists()


def test_rejected_drafts_are_never_saved(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=30)
    folder = tmp_path / "cache"
    plain = answer(new_engine(None, fake=FakeModel(habit=3.0)), PROMPT, params=params)[0]
    engine = new_engine(folder, fake=FakeModel(habit=3.0), speculation=Speculation("ngram", token_cost=0.0))
    stream = engine.submit(Request(PROMPT, params))
    assert [event.token for event in stream if event.token is not None] == plain
    assert 0 < stream.timings.accepted_tokens < stream.timings.drafted_tokens
    assert len(files_of(folder)) == (len(PROMPT) + len(plain) - 1) // SIZE
    whole = [*PROMPT, *plain]
    assert once(folder, whole, fake=FakeModel(habit=3.0))[1] == (len(whole) - 1) // SIZE * SIZE


def test_many_sequences_in_little_memory(tmp_path: Path) -> None:
    prompts = [[n % 3, *PROMPT[1 : 6 + n]] for n in range(8)]
    params = SamplingParams(temperature=0, max_tokens=20)
    alone = [answer(new_engine(None), prompt, params=params)[0] for prompt in prompts]
    preemptions = 0
    for _ in range(2):
        engine = new_engine(tmp_path / "cache", num_blocks=16, max_batch_tokens=16, max_sequences=4)
        streams = [engine.submit(Request(prompt, params)) for prompt in prompts]
        assert [[event.token for event in stream if event.token is not None] for stream in streams] == alone
        preemptions += engine.scheduler.num_preemptions
    assert preemptions > 0


@pytest.mark.parametrize("name", sorted(OPS))
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_results_are_the_same_bits(tmp_path: Path, name: str, kv_type: str) -> None:
    try:
        ops = make_ops(name)
    except ImportError as error:
        pytest.skip(f"{name} ops are not built here: {error}")
    config = replace(tiny_config(), head_dim=32)
    model = Model.bind(ops, config, random_weights(config, seed=3))
    prompt = np.random.default_rng(1).integers(3, 256, 70).tolist()
    params = SamplingParams(temperature=0, max_tokens=9, top_logprobs=5)

    def run(kind: str) -> tuple[list[Event], Timings, list[bytes]]:
        cache = PrefixCache(tmp_path / "cache", "tiny", 10**7)
        engine = Engine(model, num_blocks=6, block_size=16, kv_type=kind, prefix_cache=cache)
        stream = engine.submit(Request(prompt, params))
        events = list(stream)
        blocks = engine.scheduler.pool.match(prompt, stream.sequence.cache_salt)
        kv = engine._runner._kv
        return events, stream.timings, [bytes(ops.export_block(kv, block)) for block in blocks]

    computed, timings, blocks = run(kv_type)
    assert timings.cached_tokens == 0
    loaded, timings, again = run(kv_type)
    assert timings.cached_tokens == 64
    if name == "native":  # the reference's sums depend on how many rows it computes at once, cache or not
        assert loaded == computed
    assert [event.token for event in loaded] == [event.token for event in computed]
    assert again == blocks
    assert len(blocks) == 4
    assert run("bf16")[1].cached_tokens == 0, "another type of cache"


def test_each_instruction_set_has_its_own(tmp_path: Path) -> None:
    native_ops = pytest.importorskip("puna.ops.native_ops")
    config = tiny_config()
    names = native_ops._native.instruction_sets()
    for known in (0, 64):
        for isa in names:
            model = Model.bind(native_ops.NativeOps(1, isa), config, random_weights(config, seed=3))
            cache = PrefixCache(tmp_path / "cache", "tiny", 10**7)
            engine = Engine(model, num_blocks=6, block_size=16, prefix_cache=cache)
            assert answer(engine, list(range(3, 70)))[1] == known


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once(None)
    assert files_of(tmp_path) == []
