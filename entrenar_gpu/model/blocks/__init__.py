"""The blocks that families build their layers of: each names its weights, reads its keys of config.json, and is traced.

Letters as in config.py: T = B*S tokens, D hidden, F feed-forward, H and K heads of E, R rank. A block's weights are
listed in the order in which it uses them.
"""

from entrenar_gpu.model.blocks.attention import Attention, Normed
from entrenar_gpu.model.blocks.feed_forward import FeedForward
from entrenar_gpu.model.blocks.layer import Layer, NormNames
from entrenar_gpu.model.blocks.modules import Linear, RmsNorm, Trace

__all__ = ["Attention", "FeedForward", "Layer", "Linear", "NormNames", "Normed", "RmsNorm", "Trace"]
