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


# Of the checkpoints, as their pages and their safetensors say, a tied table counted once and towers of other kinds left
# out (looked up on 28 and 29 November 2026). The two that are missing: a toy, and one whose count was not found.
PUBLISHED = {
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-12b": 11_766_034_176,
    "gemma3-1b": 999_885_952,
    "gemma3-270m": 268_098_176,
    "gemma3-4b": 3_880_263_168,
    "glm4-9b": 9_400_279_040,
    "granite3.3-2b": 2_533_539_840,
    "granite3.3-8b": 8_170_864_640,
    "granite4-micro": 3_402_836_480,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "ministral3-3b": 3_429_006_336,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "olmo2-7b": 7_298_617_344,
    "olmo3-7b": 7_298_011_136,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm3-3b": 3_075_098_624,
}


def test_parameters_are_what_their_authors_publish():
    assert {name: TABLE["model_shape"](name).parameters for name in PUBLISHED} == PUBLISHED
    assert SHAPES.keys() - PUBLISHED.keys() == {"llama2-124m", "ministral3-8b"}
