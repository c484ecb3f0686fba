"""The schema of a training trace: every span name and every attribute, declared once.

What writes spans (tracing.py) and what reads them (detector, report) both take their names from here. Names follow
OpenTelemetry's rules: dotted, lower case, namespaced by the application, and no name is also a namespace. Where
OpenTelemetry has an attribute of its own (`service.*`), that one is used.

The tree of spans:

    train                          one a run; child of the caller's open span, if any; written last
      step                         one an optimizer step
        data | forward | backward | optimizer | checkpoint | eval | sample        phases
          layer 0 ... layer N      inside forward and backward
            <kernel>               one dispatch; its parent is a layer, or the phase where it belongs to no layer
      anomaly                      one anomaly told while the run trained; without duration, at the time of telling

A server writes spans of another kind, `request`, each a root: one per request that it understood, without its text.

A trace holds the levels down to the chosen one: `step`, `phase`, `layer` (default) or `kernel`. A span whose parent is
left out hangs on the nearest ancestor that is kept. All times are nanoseconds since the epoch on the host clock,
spans timed by the GPU included (CLOCK says which); those carry the error of that mapping, so a child may begin or end
some microseconds outside its parent. `backward` holds the layers in falling order.

A run of many steps packs earlier lines away: TRACE_PARTS in the run folder, in order, each packed with gzip, come
before TRACE_FILE, which has the newest.

The file (TRACE_FILE in the run folder) is the OpenTelemetry file exporter's JSON lines: UTF-8, one
`{"resourceSpans": [...]}` object a line. As OTLP/JSON asks: ids in lower-case
hex, enums as integers, 64-bit integers (times too) as decimal strings, doubles as numbers or as "NaN", "Infinity" and
"-Infinity" (a skipped step has them), no `parentSpanId` on a root. A step's spans come in one line, the step first;
lines are in order of time. `checkpoint`, `eval` and `sample` spans may come in a later line than their step. A killed
run may leave a part of a last line (readers pass over it, a resumed run cuts it off) and has no `train` span, so what
describes the run, its id above all, also stands in each line's resource. A resumed run appends: it is a second trace
id (and `service.instance.id`) in the same file. RUN_RESUMES and RUN_FIRST_STEP say which steps of the earlier one it
goes on from; those that it takes again count as its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

TRACE_FILE: Final = "trace.jsonl"
TRACE_PARTS: Final = "trace.[0-9][0-9][0-9][0-9][0-9].jsonl"  # earlier lines of a long run, numbered; packed: .gz
SCOPE_NAME: Final = "entrenar.observability"
SERVICE_NAME_DEFAULT: Final = "entrenar-gpu"

Level = Literal["step", "phase", "layer", "kernel"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
DEFAULT_LEVEL: Final[Level] = "layer"

TRAIN: Final = "train"
STEP: Final = "step"
DATA: Final = "data"
FORWARD: Final = "forward"
BACKWARD: Final = "backward"
OPTIMIZER: Final = "optimizer"
CHECKPOINT: Final = "checkpoint"
EVAL: Final = "eval"
SAMPLE: Final = "sample"  # answers to the run's sample prompts
REQUEST: Final = "request"  # of a server: a root span each
ANOMALY: Final = "anomaly"
PHASES: Final = (DATA, FORWARD, BACKWARD, OPTIMIZER, CHECKPOINT, EVAL, SAMPLE)
LAYER_PREFIX: Final = "layer "  # followed by the index, from 0


@dataclass(frozen=True)
class Attribute:
    """One row of the table: where the attribute stands, its OTLP type, and what it means (with its unit)."""

    name: str
    type: Literal["string", "int", "double", "bool"]
    on: str
    meaning: str


ATTRIBUTES: Final[dict[str, Attribute]] = {}


def _attribute(name: str, kind: Literal["string", "int", "double", "bool"], on: str, meaning: str) -> str:
    ATTRIBUTES[name] = Attribute(name, kind, on, meaning)
    return name


SERVICE_NAME = _attribute("service.name", "string", "resource", "entrenar-gpu, or what OTEL_SERVICE_NAME says")
SERVICE_VERSION = _attribute("service.version", "string", "resource", "version of this project")
SERVICE_INSTANCE = _attribute("service.instance.id", "string", "resource", "the run's id")

RUN_ID = _attribute("entrenar.run.id", "string", "resource, train, step", "the run's id, as its folder and log have it")
SPAN_LEVEL = _attribute(
    "entrenar.span.level", "string", "every span", "run, step, phase, layer, kernel, anomaly or request"
)
CLOCK = _attribute("entrenar.span.clock", "string", "phase and below", "gpu: GPU timestamps; absent: the host's clock")
STEP_NUMBER = _attribute("entrenar.step.number", "int", "step, phase, anomaly", "the optimizer step, from 1")

RUN_MODEL = _attribute("entrenar.run.model", "string", "resource, train", "model folder or shape")
RUN_METHOD = _attribute("entrenar.run.method", "string", "resource, train", "qlora, lora or full")
RUN_PRECISION = _attribute("entrenar.run.precision", "string", "resource, train", "f32, f16 or int8")
RUN_OUTPUT = _attribute("entrenar.run.output", "string", "resource, train", "the run folder")
RUN_PARAMETERS = _attribute("entrenar.run.parameters", "int", "resource, train", "parameters of the model")
RUN_TRAINABLE = _attribute("entrenar.run.trainable_parameters", "int", "resource, train", "parameters that train")
RUN_PLANNED_BYTES = _attribute("entrenar.run.planned_bytes", "int", "resource, train", "planned peak GPU memory, bytes")
RUN_FIRST_STEP = _attribute("entrenar.run.first_step", "int", "resource, train", "1, or the first step after a resume")
RUN_RESUMES = _attribute("entrenar.run.resumes", "string", "resource, train", "id of the run it goes on from, if any")
RUN_TOTAL_STEPS = _attribute("entrenar.run.total_steps", "int", "resource, train", "the step at which the run ends")
RUN_CONFIG = _attribute("entrenar.run.config", "string", "train", "the configuration, as JSON")
PYTHON_VERSION = _attribute("process.runtime.version", "string", "train", "version of Python")
OS_DESCRIPTION = _attribute("os.description", "string", "train", "the operating system and its version")
GPU_ADAPTER = _attribute("entrenar.gpu.adapter", "string", "resource, train", "the GPU's name")
GPU_BACKEND = _attribute("entrenar.gpu.backend", "string", "resource, train", "Vulkan, Metal, D3D12 or numpy")
GPU_DRIVER = _attribute("entrenar.gpu.driver", "string", "resource, train", "the driver and its version")
RUN_STATUS = _attribute("entrenar.run.status", "string", "train", 'finished, interrupted, or "failed: <reason>"')
RUN_STEPS = _attribute("entrenar.run.steps", "int", "train", "steps done")
RUN_SKIPPED_STEPS = _attribute("entrenar.run.skipped_steps", "int", "train", "steps skipped, as SKIPPED")
RUN_FINAL_LOSS = _attribute("entrenar.run.final_loss", "double", "train", "loss of the last step, nats a token")

EPOCH = _attribute("entrenar.step.epoch", "double", "step", "passes over the data at the end of the step")
LOSS = _attribute("entrenar.step.loss", "double", "step", "mean over the step's trained tokens, nats a token")
LEARNING_RATE = _attribute("entrenar.step.learning_rate", "double", "step", "learning rate of the step")
GRAD_NORM = _attribute("entrenar.step.grad_norm", "double", "step", "global gradient norm before clipping")
TOKENS = _attribute("entrenar.step.tokens", "int", "step", "trained (unmasked) tokens")
ROW_TOKENS = _attribute("entrenar.step.row_tokens", "int", "step", "all positions computed, padding included")
TOKENS_PER_SECOND = _attribute(
    "entrenar.step.tokens_per_second", "double", "step", "positions, less padding, per second"
)
SKIPPED = _attribute("entrenar.step.skipped", "bool", "step", "no update: loss or gradient was not finite")
ALLOCATED_BYTES = _attribute("entrenar.step.allocated_bytes", "int", "step", "GPU memory held by the run, bytes")
STEP_FLOPS = _attribute("entrenar.step.flops", "int", "step", "floating-point operations of the step's plan")

HOST_CPU = _attribute("entrenar.host.cpu_seconds", "double", "step", "processor time of the process, seconds")
HOST_RUN_DELAY = _attribute(
    "entrenar.host.run_delay_seconds", "double", "step", "its threads ready to run without a processor, summed, seconds"
)
HOST_HELD = _attribute(
    "entrenar.host.held_seconds",
    "double",
    "step",
    "the whole process kept from running (stopped, swapped out), seconds",
)
HOST_OTHERS_CPU = _attribute(
    "entrenar.host.others_cpu_seconds", "double", "step", "processor time of other programs, seconds"
)
HOST_MAJOR_FAULTS = _attribute("entrenar.host.major_faults", "int", "step", "pages read from disk to go on")
HOST_VOLUNTARY = _attribute("entrenar.host.voluntary_switches", "int", "step", "times a thread waited")
HOST_INVOLUNTARY = _attribute("entrenar.host.involuntary_switches", "int", "step", "times a thread was preempted")
HOST_RESIDENT = _attribute("entrenar.host.peak_resident_bytes", "int", "step", "largest memory of the process, bytes")
GPU_CLOCK = _attribute("entrenar.gpu.clock_mhz", "double", "step", "clock of the GPU's processors, MHz")
GPU_TEMPERATURE = _attribute("entrenar.gpu.temperature_celsius", "double", "step", "temperature of the GPU")
GPU_POWER = _attribute("entrenar.gpu.power_watts", "double", "step", "power that the GPU draws")
GPU_THROTTLE = _attribute("entrenar.gpu.throttle", "string", "step", "why the GPU's clock is held down, where it is")

# By the field of the trainer's HostStats that it comes from.
HOST_KEYS: Final = {
    "cpu_seconds": HOST_CPU,
    "run_delay_seconds": HOST_RUN_DELAY,
    "held_seconds": HOST_HELD,
    "others_cpu_seconds": HOST_OTHERS_CPU,
    "major_faults": HOST_MAJOR_FAULTS,
    "voluntary_switches": HOST_VOLUNTARY,
    "involuntary_switches": HOST_INVOLUNTARY,
    "peak_resident_bytes": HOST_RESIDENT,
    "gpu_clock_mhz": GPU_CLOCK,
    "gpu_temperature_c": GPU_TEMPERATURE,
    "gpu_power_w": GPU_POWER,
    "gpu_throttle": GPU_THROTTLE,
}

NON_FINITE = _attribute(
    "entrenar.span.non_finite",
    "int",
    "exported spans",
    "attributes left out as they were NaN or infinite; the file has them",
)
STEP_SAMPLE = _attribute(
    "entrenar.step.sample",
    "int",
    "exported spans",
    "on a step: one in so many was sent; the file has all",
)
LAYER_INDEX = _attribute("entrenar.layer.index", "int", "layer", "which transformer layer, from 0")
KERNEL_NAME = _attribute("entrenar.kernel.name", "string", "kernel", "the shader and variant that ran")
KERNEL_SHAPE = _attribute("entrenar.kernel.shape", "string", "kernel", "its problem size, as 512x9728x2560")
WORK_BYTES = _attribute("entrenar.work.bytes", "int", "phase and below", "bytes moved: read and written, or loaded")
WORK_FLOPS = _attribute("entrenar.work.flops", "int", "phase and below", "floating-point operations")

CHECKPOINT_PATH = _attribute("entrenar.checkpoint.path", "string", "checkpoint", "the folder written")
CHECKPOINT_BYTES = _attribute("entrenar.checkpoint.bytes", "int", "checkpoint", "bytes written")
EVAL_LOSS = _attribute("entrenar.eval.loss", "double", "eval", "mean over the evaluation data, nats a token")
EVAL_PERPLEXITY = _attribute("entrenar.eval.perplexity", "double", "eval", "exp of the loss")
EVAL_TOKENS = _attribute("entrenar.eval.tokens", "int", "eval", "tokens evaluated")
SAMPLE_PROMPTS = _attribute("entrenar.sample.prompts", "int", "sample", "prompts answered")

ANOMALY_CAUSE = _attribute("entrenar.anomaly.cause", "string", "anomaly", "as docs/anomalies.md lists them")
ANOMALY_SEVERITY = _attribute("entrenar.anomaly.severity", "string", "anomaly", "low, medium or high")
ANOMALY_FIRST_STEP = _attribute("entrenar.anomaly.first_step", "int", "anomaly", "first step that it is about")
ANOMALY_LAST_STEP = _attribute("entrenar.anomaly.last_step", "int", "anomaly", "last step that it is about")
ANOMALY_SPAN = _attribute("entrenar.anomaly.span", "string", "anomaly", "the kind of span at fault, or step")
ANOMALY_EVIDENCE = _attribute("entrenar.anomaly.evidence", "string", "anomaly", "why, in words")

REQUEST_ID = _attribute("entrenar.request.id", "string", "request", "the id that the reply has")
REQUEST_ROUTE = _attribute("entrenar.request.route", "string", "request", "the path of its URL")
REQUEST_MODEL = _attribute("entrenar.request.model", "string", "request", "the adapter asked for, or base")
REQUEST_STATUS = _attribute("entrenar.request.status", "int", "request", "HTTP status; 499: the client went away")
REQUEST_FINISH = _attribute("entrenar.request.finish", "string", "request", "why each answer ended: stop, length, ...")
REQUEST_PROMPT = _attribute("entrenar.request.prompt_tokens", "int", "request", "tokens of the prompts")
REQUEST_CACHED = _attribute("entrenar.request.cached_tokens", "int", "request", "of these, in the cache already")
REQUEST_DRAWN = _attribute("entrenar.request.completion_tokens", "int", "request", "tokens of the answers")
REQUEST_FIRST = _attribute("entrenar.request.first_token_seconds", "double", "request", "until the first token")

# What the trainer may put in a span's `attributes`, by its short key. Another key k stands as `entrenar.span.<k>`.
SPAN_KEYS: Final = {
    "layer": LAYER_INDEX,
    "kernel": KERNEL_NAME,
    "shape": KERNEL_SHAPE,
    "bytes": WORK_BYTES,
    "flops": WORK_FLOPS,
}
