"""objects.json: which content each record of a run may have in the store, and who wrote it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace

from launcher.errors import StoreError
from launcher.json_file import DamagedJSONError, decode_json, encode_json
from launcher.mirrors.inventory import INDEX
from launcher.object_stores.object_store import ObjectStore, StoredObject


@dataclass(frozen=True, kw_only=True)
class ObjectIndex:
    """The records of a run in a store.

    While a record is replaced, it has two digests: that of the object that is there, and that of
    the one that is being written. An object has one of them at every moment. The empty digest
    stands for no object.
    """

    session: str
    """Id of the process that wrote here last."""

    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The SHA-256 that each object may have, the newest last."""

    def holds(self, name: str, digest: str) -> bool:
        """Return whether an object certainly has a content."""
        return self.files.get(name) == (digest,)

    def before(self, digests: Mapping[str, str]) -> ObjectIndex:
        """Return the index for the time in which some records are replaced."""
        both = {name: (self.files.get(name, ("",))[-1], new) for name, new in digests.items()}
        return replace(self, files={**self.files, **both})

    def after(self, digests: Mapping[str, str]) -> ObjectIndex:
        """Return the index for the time after some records have been replaced."""
        new = {name: (digest,) for name, digest in digests.items()}
        return replace(self, files={**self.files, **new})

    def without(self, names: Collection[str]) -> ObjectIndex:
        """Return the index without some records."""
        kept = {name: each for name, each in self.files.items() if name not in names}
        return replace(self, files=kept)


def read_index(store: ObjectStore, listed: Mapping[str, StoredObject]) -> ObjectIndex | None:
    """Return the index of a store, or None if it has none.

    Args:
        store: The store.
        listed: Its objects.

    Raises:
        StoreError: It cannot be read, or is damaged.
    """
    if INDEX not in listed:
        return None
    try:
        return decode_json(store.read(INDEX), ObjectIndex)
    except DamagedJSONError as error:
        raise StoreError(
            f"{store.shown}/{INDEX} is damaged, or launcher did not write it: {error}. Without it "
            "nothing that the run recorded can be verified: restore it, or take another URL."
        ) from None


def write_index(store: ObjectStore, index: ObjectIndex) -> None:
    """Write the index of a store.

    Raises:
        StoreError: It cannot be written.
    """
    store.write(INDEX, (encode_json(asdict(index), indent=1) + "\n").encode())
