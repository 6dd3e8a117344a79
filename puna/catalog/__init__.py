"""Every published Llama release and its kin: shape, context, licence, where its weights are had; the default model."""

from puna.catalog.entry import CatalogEntry, Licence, Source
from puna.catalog.lookup import DEFAULT, entries, get

__all__ = ["DEFAULT", "CatalogEntry", "Licence", "Source", "entries", "get"]
