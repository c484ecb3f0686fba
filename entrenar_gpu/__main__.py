"""`python -m entrenar_gpu`: the command line, as `python -m entrenar_gpu.cli` is."""

import runpy

runpy.run_module("entrenar_gpu.cli", run_name="__main__", alter_sys=True)
