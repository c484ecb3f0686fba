"""lm-evaluation-harness over our model: its accuracies are those of `eval --task choices`, and transformers' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.parity

from entrenar_gpu import load  # noqa: E402
from entrenar_gpu.cli.demo import MODEL  # noqa: E402
from entrenar_gpu.infer.harness import HarnessLM  # noqa: E402

PAIRS = [
    ("What does os.getcwd() do?\n", "Return a string representing the current working directory."),
    ("What does abs(x) do?\n", " Return the absolute value of the argument."),
    ("", "Return the absolute value."),
    ("Spaces at the end  ", "belong to what follows"),
]


def instance(*args):
    return SimpleNamespace(args=args)


def test_the_harness_finds_what_transformers_finds():
    """Log-probabilities within 1e-3 of lm_eval's own model for transformers, over the same files."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(MODEL), device="cpu", dtype="float32", batch_size=1)
    with load(str(MODEL), device="numpy", context=128) as model:
        ours = HarnessLM(model)
        requests = [instance(*pair) for pair in PAIRS]
        texts = [instance("Return the absolute value of the argument. " * 3)]
        want = theirs.loglikelihood([SimpleNamespace(args=pair, request_type="loglikelihood") for pair in PAIRS])
        got = ours.loglikelihood(requests)
        assert [g[0] for g in got] == pytest.approx([w[0] for w in want], abs=1e-3)
        assert [g[1] for g in got] == [w[1] for w in want]
        assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
        question = instance("What does abs(x) do?\n", {"until": ["."], "max_gen_toks": 24})
        (said,) = ours.generate_until([question])
        assert said == theirs.generate_until([question])[0]
