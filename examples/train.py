"""Fine-tune from Python, with an observer of one's own.

python examples/train.py MODEL_FOLDER TRAIN.jsonl RUN_FOLDER
"""

import sys

from entrenar_gpu import StepRecord, TrainConfig, Trainer


class EveryTenth:
    """Any object with some of the methods of entrenar_gpu.events.StepObserver will do."""

    def step_finished(self, record: StepRecord) -> None:
        if record.step % 10 == 0:
            print(f"step {record.step}: loss {record.loss:.4f}, {record.tokens_per_second:,.0f} tokens/s")


model, data, output = sys.argv[1:4]
config = TrainConfig(model=model, data=data, output=output, rank=16, batch=4, seq=512, epochs=1)
summary = Trainer(config, observers=[EveryTenth()]).run()
print(f"{summary.status} after {summary.steps} steps: {summary.output}/adapter_model.safetensors")
