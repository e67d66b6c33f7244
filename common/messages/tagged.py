"""The base of all messages."""

import msgspec


class TaggedStruct(msgspec.Struct, frozen=True, array_like=True, tag=str.lower, omit_defaults=False):
    """Immutable; on the wire an array ``[tag, *fields]``, tagged with the lower-case class name."""
