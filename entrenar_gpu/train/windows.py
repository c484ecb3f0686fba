"""Long samples in windows that slide on by less than their length, so that every token is scored with context."""

from __future__ import annotations

import numpy as np

from entrenar_gpu.data import Samples
from entrenar_gpu.ops.loss import IGNORE


def sliding(samples: Samples, seq: int, stride: int) -> Samples:
    """Windows of `seq` tokens, each `stride` tokens further on: every target is scored in the first that reaches it.

    So all but a sample's first `seq` tokens are predicted from at least `seq - stride + 1` others; the perplexity of
    fixed-length models in transformers' documentation. Samples of at most `seq` tokens stay as they are.
    """
    tokens, targets, weights, starts = [], [], [], [0]
    for i in range(len(samples)):
        ids, wanted = samples[i]
        for begin in range(0, max(len(ids) - (seq - stride), 1), stride):
            window = wanted[begin : begin + seq].copy()
            if begin:
                window[: seq - stride] = IGNORE
            if (window != IGNORE).any():
                tokens.append(ids[begin : begin + seq])
                targets.append(window)
                if samples.weights is not None:
                    counted = samples.weights[samples.starts[i] + begin :][: len(window)]
                    weights.append(np.where(window != IGNORE, counted, 0))
                starts.append(starts[-1] + len(window))
    return Samples(
        np.concatenate(tokens),
        np.concatenate(targets),
        np.array(starts),
        notes=samples.notes,
        weights=np.concatenate(weights) if weights else None,
    )
