"""A model behind OpenAI's HTTP interface."""

from entrenar_gpu.serve.app import make_app
from entrenar_gpu.serve.engine import Engine
from entrenar_gpu.serve.served import Served
from entrenar_gpu.serve.server import HttpServer

__all__ = [
    "Engine",
    "HttpServer",
    "Served",
    "make_app",
]
