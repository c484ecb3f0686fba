"""A few sentences and steps of a pretrained model against transformers and PEFT; `make real` takes 200 and 30."""

from __future__ import annotations

import pytest

from tests import ROOT

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.real.compare import compare

pytestmark = [pytest.mark.parity, pytest.mark.gpu]
MODEL = ROOT / "artifacts" / "models" / "smollm2"


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="SmolLM2 is not there; make smollm fetches it")
def test_losses_and_steps_of_smollm2():
    assert compare(MODEL, sentences=4, steps=3, device=None)
