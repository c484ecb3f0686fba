"""`python -m entrenar_gpu.cli`, where the script is not on the path."""

from entrenar_gpu.cli.main import main

main()
