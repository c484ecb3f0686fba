"""What a reader of traces can be handed that it cannot use, as one kind of exception."""


class TraceError(Exception):
    """Unusable input: one clear line naming the file, line, address or flag. The commands print it and exit with 2."""
