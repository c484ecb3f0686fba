"""The next token's logits by one pass over the whole row, without a cache: what decoding is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entrenar_gpu.session import Session


def next_logits(session: Session, ids: Sequence[int]) -> np.ndarray:
    """Logits [V] of the token after `ids`; for a session that runs `logits_graph` on one row."""
    seq = session.config.seq
    padded = np.zeros(seq, np.uint32)
    padded[: len(ids)] = ids
    segment = np.arange(seq, dtype=np.uint32)
    segment[: len(ids)] = 0
    session.write_batch({"input_ids": padded, "positions": np.arange(seq, dtype=np.uint32), "segment_start": segment})
    session.executor.write("logits_at", np.array([len(ids) - 1], np.uint32))
    session.executor.run("logits")
    return session.executor.read("logits")[0]
