"""The command line: parses, calls one function a command, and turns bad input into one line and exit status 2.

The only module, but for serve.py, that wires observers (progress, tracing) to what runs.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from entrenar_gpu import signals
from entrenar_gpu.cli import chat, evaluate, export, generate, options, serve
from entrenar_gpu.cli.bench.commands import bench
from entrenar_gpu.cli.other_names import our_names
from entrenar_gpu.cli.text import make_logs_printable, print_json, printable
from entrenar_gpu.config import shape_file
from entrenar_gpu.errors import OutOfDeviceMemory, UserError, speaking_flags
from observability.errors import TraceError
from observability.streams import print_any_text

app = typer.Typer(
    help="Fine-tune language models on any Vulkan, Metal or DX12 GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# typer carries its own copy of click in newer versions; these are the exceptions of whichever it uses.
_ClickError: type[Any] = typer.BadParameter.__mro__[2]

_TYPERS_INTERRUPT = 130  # what newer versions make of KeyboardInterrupt


def _version(asked: bool) -> None:
    if asked:
        from entrenar_gpu import __version__

        print(f"entrenar-gpu {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Fine-tune language models on any Vulkan, Metal or DX12 GPU."""


@app.command()
def info(as_json: options.Json = False) -> None:
    """List GPUs, their features and limits, and what the trainer would use."""
    from entrenar_gpu.cli.info import describe, show

    found = describe()
    print_json(found) if as_json else show(found)


@app.command()
@options.with_options(
    "model", "method", "rank", "target", "layers", "layers_to_transform", "modules_to_save",
    "trainable_token_indices", "batch", "seq", "accumulate", "optimizer", "momentum", "dropout", "double_quant",
    "precision", "trace_level", "memory_budget", "device", "engine",
)  # fmt: skip
def plan(
    given: Mapping[str, Any],
    shape: Annotated[str | None, typer.Option(help="plan for a well-known model by name instead of --model")] = None,
    profile: Annotated[
        str | None, typer.Option(help="plan for these capabilities instead of a device's: webgpu, desktop, large")
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="plan for evaluation during training too")] = False,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="plan for --batch answers at a time, of so many tokens")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="print every step of the plan")] = False,
    as_json: options.Json = False,
) -> None:
    """Print what a run would allocate and what it would recompute, without weights or a GPU."""
    from entrenar_gpu.session import caps_for, memory_budget, plan_run

    if shape is not None:
        if "model" in given:
            raise UserError("--shape: give it or --model, not both")
        given = {**given, "model": str(shape_file(shape))}
    # One row unless told otherwise: the question is usually whether a model fits at all.
    config = options.make_config(given, batch=1)
    caps = caps_for(config.device, config.engine, profile)
    if context is None:
        report = plan_run(config, caps, memory_budget(config, caps).nbytes, evaluate)
    else:
        from entrenar_gpu.infer import plan_decoder

        report = plan_decoder(config, caps, memory_budget(config, caps).nbytes, context)
    if as_json:
        print_json(report.to_mapping())
        return
    if verbose:
        print(report.plan.describe())
    from entrenar_gpu.cli.display import show_plan

    show_plan(report.to_mapping())


@app.command()
def shader(
    op: Annotated[str | None, typer.Argument(metavar="[OP]", help="see --list")] = None,
    shape: Annotated[str | None, typer.Option("--shape", help="the op's sizes, as in 512x2560; see --list")] = None,
    precision: Annotated[str, typer.Option("--precision", help="f32, f16 or int8")] = "f32",
    profile: Annotated[str | None, typer.Option(help="capabilities: webgpu, desktop (the default), large")] = None,
    device: Annotated[str | None, typer.Option("--device", help="those of this GPU instead, by index or name")] = None,
    gradient: Annotated[bool, typer.Option("--gradient", help="the shaders of the op's gradient too")] = False,
    list_: Annotated[bool, typer.Option("--list", help="list ops and their sizes; of an op, its launches")] = False,
) -> None:
    """Print the WGSL of an op at a shape, without a GPU."""
    from entrenar_gpu.cli.op_programs import PROGRAMS
    from entrenar_gpu.cli.shader import dispatches, print_launches, print_shaders, usage
    from entrenar_gpu.session import caps_for

    if op is None:
        if not list_:
            raise UserError("shader: name an op, or give --list")
        print("\n".join(map(usage, sorted(PROGRAMS))))
        return
    found = dispatches(op, shape, precision, caps_for(device, None, profile))
    print_launches(found) if list_ else print_shaders(found, gradient)


@app.command("data")
@options.with_options(
    "model", "split", "map", "seq", "loss_on", "completions",
)  # fmt: skip
def show_data(
    given: Mapping[str, Any],
    data: Annotated[list[str], typer.Argument(help="file of rows, folder, or data set of the Hub")],
    shown: Annotated[int, typer.Option("--samples", min=0, help="samples printed in full")] = 3,
    check: Annotated[bool, typer.Option("--check", help="exit with status 1 where something looks wrong")] = False,
    as_json: options.Json = False,
) -> None:
    """Show rows as they will be trained: trained tokens in green, lengths, what is cut or skipped; without a GPU."""
    from rich.console import Console

    from entrenar_gpu.cli.data_report import show_data, show_problems
    from entrenar_gpu.data import inspect_samples
    from entrenar_gpu.train import DataReader

    reader = DataReader(options.make_config(given, data=data))
    samples = reader.named()
    found = inspect_samples(samples, reader.tokenizer, reader.config.seq)
    if as_json:
        print_json(found.to_mapping())
    else:
        show_data(samples, reader.tokenizer, found, shown, Console())
    show_problems(found)
    if check and found.problems:
        raise typer.Exit(1)


@app.command()
@options.with_options(*options.FIELDS)
def train(
    given: Mapping[str, Any],
    config: Annotated[str | None, typer.Option("--config", help="YAML file with any of these keys; flags win")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Fine-tune a model on data of your own."""
    from entrenar_gpu.cli.display import Progress, show_start
    from entrenar_gpu.train import Trainer

    made, progress = options.make_config(given, config), Progress(quiet)
    options.refuse_other_adapter(given, made, config)
    tracer, observers = _tracing(made, progress)  # a wrong --otlp is told before a model is loaded
    trainer = Trainer(made)
    if not quiet:
        show_start(trainer, progress.console)
    trainer.observe(progress, *observers)
    try:
        summary = trainer.run()
    finally:
        tracer.close()
    if summary.status == "interrupted":
        raise typer.Exit(signals.exit_status(trainer.stopped_by or signal.SIGINT))


def _tracing(config: Any, progress: Any) -> tuple[Any, list[Any]]:
    """(tracer, all observers that watch a run): spans to its folder and to --otlp, anomalies as they happen."""
    import observability
    from entrenar_gpu.cli.trackers import trackers
    from observability.detect import LiveDetector

    tracer = observability.observe(
        config.output,
        level=config.trace_level,
        otlp=config.otlp and config.otlp.partition("#")[0],  # nothing behind it is sent, or to be shown
        kernels_every=config.trace_kernels_every,
        otlp_sample=config.otlp_sample,
    )
    detector = LiveDetector(
        emit=lambda line: progress.say(line, "magenta"),
        on_finding=tracer.told,
    )
    # At the end of the run the detector still finds anomalies, which the tracer counts until it has ended itself.
    return tracer, [detector, tracer, *trackers(config.report_to, config.output)]


@app.command()
def demo(
    output: Annotated[str | None, typer.Option("--output", help="new run folder (default runs/demo-DATE)")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="optimizer steps")] = None,
    device: Annotated[str | None, typer.Option("--device", help="GPU by index or name, or numpy")] = None,
) -> None:
    """Fine-tune the model that ships with the project on Python's own docstrings; downloads nothing."""
    from entrenar_gpu.cli.demo import RUN, default_output, run_demo
    from entrenar_gpu.cli.display import Progress

    folder = output or default_output()
    progress = Progress()
    _, observers = _tracing(replace(RUN, output=folder), progress)
    run_demo(folder, steps, [progress, *observers], device=device, console=progress.console)


@app.command(
    "report", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def report(context: typer.Context) -> None:
    """Explain a run from its trace: RUN|TRACE [--html OUT] [--json OUT] [--perfetto OUT] [--against RUN]."""
    from observability import report

    raise typer.Exit(report.main(context.args, prog="entrenar-gpu report"))


app.command("eval")(evaluate.evaluate)
for command in (generate.generate, chat.chat, serve.serve, export.export):
    app.command()(command)
app.add_typer(bench, name="bench")


@app.command()
def merge(
    model: Annotated[str, typer.Option("--model", help="model folder or Hub id")],
    adapter: Annotated[str, typer.Option("--adapter", help="PEFT adapter folder")],
    output: Annotated[str, typer.Option("--output", help="folder for the merged model")],
    base: Annotated[
        str,
        typer.Option("--base", help="stored: weights as they are; nf4: their NF4 form, written in f32"),
    ] = "stored",
) -> None:
    """Fold an adapter into its base model, as safetensors that transformers loads."""
    from entrenar_gpu.export import merge_model

    notes = merge_model(model, adapter, output, base)
    form = "stored weights" if base == "stored" else "NF4 form of the weights"
    print(f"merged model: {printable(output)}, on the {form}")
    for note in notes:
        print(f"note: {printable(note)}")


@app.command("import-config")
def import_config(file: Annotated[str, typer.Argument(help="YAML file of mlx-lm")]) -> None:
    """Print an mlx-lm configuration as one of ours, for train --config; what has no counterpart to standard error."""
    from entrenar_gpu.cli.other_names import import_mlx_config

    text, left = import_mlx_config(file)
    print(text, end="")
    for line in left:
        print(printable(f"no counterpart: {line}"), file=sys.stderr)


def main() -> None:
    """Run the command line and exit with its status; `__main__` calls this."""
    print_any_text()
    sys.unraisablehook = _unraisable
    with signals.ending(signals.interrupt):
        status = run(sys.argv[1:])
    # `python -m` ends by SIGINT, whatever it is told here, where a KeyboardInterrupt last went through text that was
    # run, as what dataclasses make of themselves while modules are loaded; text that ends well makes it forget that.
    exec("")
    sys.exit(status)


def _unraisable(problem: Any) -> None:
    """An interrupt that came where Python cannot raise, as in a finalizer, ends the process all the same."""
    if isinstance(problem.exc_value, KeyboardInterrupt):
        signals.leave(signals.interrupted_by(), None)
    sys.__unraisablehook__(problem)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status: 0, 2 for bad input, 128 and its number for a signal."""
    make_logs_printable()
    with speaking_flags():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        command = typer.main.get_command(app)
        result = command.main(args=_with_resume(our_names(arguments)), prog_name="entrenar-gpu", standalone_mode=False)
        interrupted = result == _TYPERS_INTERRUPT and signals.interrupted_by()
        return signals.exit_status(interrupted) if interrupted else int(result or 0)
    except OutOfDeviceMemory as error:
        error.remedy = f"lower {_flags_of_size(arguments)}, or end what else uses it"
        return _complain(str(error))
    except (UserError, TraceError) as error:
        return _complain(str(error))
    except _ClickError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        return _complain(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        return signals.exit_status(signals.interrupted_by())
    except MemoryError:
        return _no_memory(arguments)
    except OSError as error:  # what nobody closer to it expected: standard output on a full disk, say
        return _complain(f"{error.filename or 'output'}: {error.strerror or error}")
    except RuntimeError as error:
        if str(error) == "can't start new thread":  # what Python says where there is no memory for its stack
            return _no_memory(arguments)
        if not signals.is_interrupt(error):
            raise
        return signals.exit_status(signals.interrupted_by())


def _no_memory(arguments: list[str]) -> int:
    lower = _flags_of_size(arguments)
    return _complain(f"this machine has no memory left; lower {lower}, or raise the limit (`ulimit -v`)")


def _flags_of_size(arguments: list[str]) -> str:
    """What the command on this line can be told to need less memory by."""
    group: Any = typer.main.get_command(app)
    command = group.commands.get(next(iter(arguments), ""))
    there = {flag for parameter in getattr(command, "params", ()) for flag in parameter.opts}
    flags = [flag for flag in ("--memory-budget", "--batch", "--slots", "--context", "--seq") if flag in there]
    return " or ".join([", ".join(flags[:-1]), flags[-1]] if len(flags) > 1 else flags) or "what is asked of it"


def _complain(message: str) -> int:
    with contextlib.suppress(OSError):  # standard error may be full as well
        print("error: " + printable(" ".join(message.split())), file=sys.stderr, flush=True)
    return 2


def _with_resume(arguments: list[str]) -> list[str]:
    """`--resume` may stand alone, for the newest checkpoint of --output."""
    result = []
    for index, word in enumerate(arguments):
        result.append(word)
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if word == "--resume" and following.startswith("-"):
            result.append("latest")
    return result
