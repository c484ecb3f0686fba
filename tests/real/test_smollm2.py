"""A few sentences and steps of a pretrained model against transformers and PEFT; `make real` takes 200 and 30."""

from __future__ import annotations

import pytest

from tests import ROOT

pytestmark = [pytest.mark.parity, pytest.mark.gpu]
MODEL = ROOT / "artifacts" / "models" / "smollm2"


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="SmolLM2 is not there; make smollm fetches it")
def test_losses_and_steps_of_smollm2():
    from tests.real.compare import compare  # late: torch is there in `make parity` alone

    assert compare(MODEL, sentences=4, steps=3, device=None)
