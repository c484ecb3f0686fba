"""The device, its kernels, replay: the only room that touches WebGPU."""

from entrenar_gpu.gpu.autotune import sweep, tuned
from entrenar_gpu.gpu.clock import GpuClock, step_spans
from entrenar_gpu.gpu.device import NO_GPU, REFUSED_FEATURES, Device, choose_gpu, gpu_caps, gpus
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.measure import TOLERANCES, Product, choice_of, measure, time_run
from entrenar_gpu.gpu.memory_info import driver_bytes
from entrenar_gpu.gpu.replay import Replay, Report
from entrenar_gpu.gpu.upload import THREADS, Uploader, pieces

__all__ = [
    "NO_GPU",
    "REFUSED_FEATURES",
    "THREADS",
    "TOLERANCES",
    "Device",
    "GpuClock",
    "KernelCache",
    "Product",
    "Replay",
    "Report",
    "Uploader",
    "choice_of",
    "choose_gpu",
    "driver_bytes",
    "gpu_caps",
    "gpus",
    "measure",
    "pieces",
    "step_spans",
    "sweep",
    "time_run",
    "tuned",
]
