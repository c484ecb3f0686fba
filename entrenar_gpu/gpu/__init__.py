"""The device, its kernels, replay: the only room that touches WebGPU."""

from entrenar_gpu.gpu.autotune import sweep, tuned
from entrenar_gpu.gpu.choice import NO_GPU, Choice, Gpu, choose_gpu, gpu_caps, gpus, is_host
from entrenar_gpu.gpu.clock import GpuClock, step_spans
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.engines import ENGINES, engine
from entrenar_gpu.gpu.failures import device_errors
from entrenar_gpu.gpu.kernel import KernelCache, render
from entrenar_gpu.gpu.matrix_check import open_device
from entrenar_gpu.gpu.measure import TOLERANCES, MatmulCase, choice_of, measure, time_run
from entrenar_gpu.gpu.memory_info import driver_bytes
from entrenar_gpu.gpu.replay import Replay, Report
from entrenar_gpu.gpu.upload import THREADS, Uploader, finite, pieces

__all__ = [
    "ENGINES",
    "NO_GPU",
    "THREADS",
    "TOLERANCES",
    "Choice",
    "Device",
    "Gpu",
    "GpuClock",
    "KernelCache",
    "MatmulCase",
    "Replay",
    "Report",
    "Uploader",
    "choice_of",
    "choose_gpu",
    "device_errors",
    "driver_bytes",
    "engine",
    "finite",
    "gpu_caps",
    "gpus",
    "is_host",
    "measure",
    "open_device",
    "pieces",
    "render",
    "step_spans",
    "sweep",
    "time_run",
    "tuned",
]
