"""Prefixes that outlive the process: the blocks of the key/value cache, one file each."""

from __future__ import annotations

import hashlib
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from puna.config import ModelConfig
from puna.engine.prefix_files import PrefixFiles
from puna.errors import RequestError
from puna.ops.protocol import KVCache, Ops

# A file: header (magic with the version, tokens, bytes of the block, digest of what comes before), tokens as int32,
# the block, and the SHA-256 of all that.
_MAGIC = b"PunaKV\x00\x01"
_HEADER = struct.Struct("<8sIQ32s")
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class PrefixCache:
    """Where prefixes are kept on disk.

    ``model`` tells the model's weights from all others: with equal ones, equal tokens have equal keys and values.
    """

    folder: Path
    model: str
    max_bytes: int


class _Link(NamedTuple):
    """One block of a chain. ``digest`` stands for its tokens and all before them, ``parent`` for those before."""

    parent: bytes
    tokens: bytes
    digest: bytes

    @property
    def name(self) -> str:
        return self.digest.hex()


class PrefixStore:
    """Full blocks by their tokens and those before them, for one model on one implementation.

    A file says whose it is, so a block is taken only when model, salt and every token are the same and its checksum is
    right; any other file of that name is removed. A disk that fails or is full costs the saving, not the request.
    """

    def __init__(self, cache: PrefixCache, config: ModelConfig, ops: Ops, kv: KVCache) -> None:
        """Raises RequestError when the folder can't be used or holds not even one block."""
        self._ops, self._kv = ops, kv
        self._block_bytes = ops.export_block(kv, 0).nbytes
        self._file_bytes = _HEADER.size + 4 * kv.block_size + self._block_bytes + _DIGEST_BYTES
        if cache.max_bytes < self._file_bytes:
            raise RequestError(
                f"cache_size must be at least {self._file_bytes} bytes, one block of this model, "
                f"found {cache.max_bytes}"
            )
        self._files = PrefixFiles(cache.folder, cache.max_bytes)
        identity = (cache.model, repr(config), ops.cache_identity(kv), sys.byteorder)
        self._identity = b"".join(hashlib.sha256(text.encode()).digest() for text in identity)
        self._warned = False

    def load(self, tokens: Sequence[int], salt: str, blocks: Sequence[int], found: int) -> int:
        """Fill ``blocks[found:]`` as far as ``tokens`` are on disk. Returns how many blocks hold them then."""
        for i, link in enumerate(self._chain(tokens, salt)):
            if i < found:
                continue
            data = self._read(link)
            if data is None:
                break
            self._ops.import_block(self._kv, blocks[i], data)
            found += 1
        return found

    def save(self, tokens: Sequence[int], salt: str, blocks: Sequence[int]) -> None:
        """Keep ``blocks``, full ones that hold the first of ``tokens``, and note that they were just used."""
        now = time.time_ns()
        room = self._files.max_bytes // self._file_bytes
        missing = []
        for i, link in enumerate(self._chain(tokens[: min(len(blocks), room) * self._kv.block_size], salt)):
            used = now - 1000 * i  # the ends of prefixes go before what they follow
            if not self._files.touch(link.name, used):
                missing.append((blocks[i], link, used))
        if not missing:
            return
        try:
            self._files.make_room(len(missing) * self._file_bytes)
            for block, link, used in missing:
                self._write(block, link, used)
            self._files.make_room(0)  # another process may have written meanwhile
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"prefixes are not saved in {self._files.folder}: {error.strerror or error}; "
                    "free some space or choose another cache_dir",
                    stacklevel=2,
                )

    def _chain(self, tokens: Sequence[int], salt: str) -> Iterator[_Link]:
        """The links of all full blocks of ``tokens``."""
        size = self._kv.block_size
        parent = hashlib.sha256(self._identity + salt.encode("utf-8", "surrogatepass")).digest()
        for start in range(0, len(tokens) - size + 1, size):
            own = np.array(tokens[start : start + size], "<i4").tobytes()
            digest = hashlib.sha256(parent + own).digest()
            yield _Link(parent, own, digest)
            parent = digest

    def _header(self, link: _Link) -> bytes:
        return _HEADER.pack(_MAGIC, self._kv.block_size, self._block_bytes, link.parent) + link.tokens

    def _read(self, link: _Link) -> memoryview | None:
        data = self._files.read(link.name, self._file_bytes)
        if data is None:
            return None
        view = memoryview(data)
        content, checksum = view[:-_DIGEST_BYTES], view[-_DIGEST_BYTES:]
        header = self._header(link)
        if content[: len(header)] != header or hashlib.sha256(content).digest() != checksum:
            self._files.remove(link.name)
            return None
        return content[len(header) :]

    def _write(self, block: int, link: _Link, used_ns: int) -> None:
        header, data = self._header(link), self._ops.export_block(self._kv, block)
        checksum = hashlib.sha256(header)
        checksum.update(data)
        self._files.write(link.name, (header, data, checksum.digest()), used_ns)
