"""docs/models.md against the shapes that it is made from."""

from __future__ import annotations

import runpy

import pytest

from entrenar_gpu.config.presets import SHAPES
from tests import ROOT

TABLE = runpy.run_path(str(ROOT / "scripts" / "models_table.py"))
ROWS = {
    line.split()[1]: line for line in (ROOT / "docs" / "models.md").read_text().splitlines() if line.startswith("| ")
}


def test_every_shape_is_on_the_page_with_its_sizes():
    for name in SHAPES:
        assert ROWS[name].startswith(TABLE["sizes"](name)), name
    assert ROWS.keys() - SHAPES.keys() == {"model"}


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_plans_on_the_page_are_current(name):
    assert float(ROWS[name].split("|")[-2]) == pytest.approx(TABLE["planned_bytes"](name) / 1e9, abs=5e-3)


def test_parameters_are_what_their_authors_publish():
    """From the model cards, in millions."""
    published = {"llama2-7b": 6738.4, "gemma2-2b": 2614.3, "mistral-7b": 7248.0, "phi-4": 14659.5, "gemma3-1b": 999.9}
    counts = {name: TABLE["model_shape"](name).parameters / 1e6 for name in published}
    assert counts == pytest.approx(published, abs=0.05)
