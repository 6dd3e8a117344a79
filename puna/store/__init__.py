"""The local model store: content-addressed blobs, the manifests that name them, and where models are pulled from."""

from puna.store.importing import import_file
from puna.store.manifest import Lineage, Manifest, StoredFile
from puna.store.names import ModelName
from puna.store.progress import Progress, Silent
from puna.store.pull import pull
from puna.store.resolve import ResolvedModel, resolve, resolve_stored
from puna.store.store import Damage, Store

__all__ = [
    "Damage",
    "Lineage",
    "Manifest",
    "ModelName",
    "Progress",
    "ResolvedModel",
    "Silent",
    "Store",
    "StoredFile",
    "import_file",
    "pull",
    "resolve",
    "resolve_stored",
]
