"""Train every weight of a Llama 2 model.

python examples/llama2/train.py DATA RUN_FOLDER [MODEL]

The options are those of train.yaml beside this file, which `entrenar-gpu train --config` takes as well.
"""

import sys
from pathlib import Path

import yaml

from entrenar_gpu import Progress, TrainConfig, Trainer

options = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
options |= dict(zip(("data", "output", "model"), sys.argv[1:4], strict=False))
with Trainer(TrainConfig(**options), [Progress()]) as trainer:
    summary = trainer.run()
print(f"{summary.status} after {summary.steps} steps, loss {summary.final_loss:.4f}: {summary.output}")
