"""`chat`: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from entrenar_gpu import signals
from entrenar_gpu.cli import options
from entrenar_gpu.cli.generate import Bias, Context, Speculate, Stop
from entrenar_gpu.cli.text import printable
from entrenar_gpu.errors import DeviceLost, UserError

if TYPE_CHECKING:
    from entrenar_gpu.chat import Message
    from entrenar_gpu.infer import LanguageModel

HELP = """/reset        begin again; the system's message stays
/system TEXT  set the system's message and begin again; without TEXT, remove it
/save FILE    add the conversation to a JSONL file that `train` reads
/quit         leave (Ctrl-D does too; Ctrl-C stops an answer)"""


@options.with_options(*options.RUNTIME, sampling=True)
def chat(
    given: Mapping[str, Any],
    system: options.System = None,
    adapter: options.Adapter = None,
    context: Context = None,
    stop: Stop = None,
    logit_bias: Bias = None,
    speculate: Speculate = True,
) -> None:
    """Talk with a model and its adapter; /help lists what else can be typed."""
    run, sampling = options.split(given)
    sampling = {"max_tokens": 1 << 20, **sampling, "stop": stop or (), "logit_bias": options.biases(logit_bias)}
    with options.open_model(run, [adapter] if adapter else [], context, 1, speculate) as model:
        if not model.tokenizer.has_chat_template:
            raise UserError(f"{model.tokenizer.folder}: the model has no chat template; `generate` continues texts")
        Chat(model, sampling, system).run()


class Chat:
    """A conversation, and what is typed into it."""

    def __init__(self, model: LanguageModel, sampling: Mapping[str, Any], system: str | None = None) -> None:
        from entrenar_gpu.config import SamplingOptions

        self._model = model
        self._options = SamplingOptions(**sampling)
        self._system = system
        self.messages: list[Message] = []
        self.reset()
        self._stop = threading.Event()
        self._answering = False
        self._commands: dict[str, Callable[[str], bool]] = {
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
            "/help": self._help,
            "/quit": lambda rest: False,
            "/exit": lambda rest: False,
        }

    def run(self) -> None:
        """Read lines until the end of the input or /quit."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  editing of lines, and those before

            print("/help lists what else can be typed", file=sys.stderr)
        with signals.ending(self._interrupt):
            while True:
                try:
                    if not self.take(input("> " if sys.stdin.isatty() else "").strip()):
                        return
                except EOFError:
                    return
                except KeyboardInterrupt:
                    print("\n(/quit or Ctrl-D to leave)", file=sys.stderr)

    def take(self, line: str) -> bool:
        """Do what a line asks for; False where it ends the conversation."""
        if not line:
            return True
        word, _, rest = line.partition(" ")
        if word.startswith("/"):
            if word not in self._commands:
                return self._say(f"{word}: not known; /help lists what is")
            return self._commands[word](rest.strip())
        self.messages.append({"role": "user", "content": line})
        try:
            self._answer()
        except DeviceLost:
            raise
        except UserError as error:  # the template refuses it, or there is no room left
            self.messages.pop()
            self._say(f"{error}; /reset begins again")
        return True

    def reset(self) -> None:
        """Forget what was said, but for the system's message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _answer(self) -> None:
        request = self._model.request(self._model.encode_chat(self.messages), self._options)
        said: list[str] = []
        self._stop.clear()
        self._answering = True
        try:
            for delta in self._model.deltas(request, self._stop):
                said.append(delta.text)
                print(printable(delta.text, sys.maxsize, keep="\n\t"), end="", flush=True)
        finally:
            self._answering = False
            print()
        if self._stop.is_set():
            self._say("(stopped)")
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def _interrupt(self, number: int, frame: Any) -> None:
        """Ctrl-C stops an answer between two tokens, where the model is in order; at the prompt it drops the line."""
        if number != signal.SIGINT:
            raise typer.Exit(signals.exit_status(number))
        if not self._answering:
            raise KeyboardInterrupt
        self._stop.set()

    def _reset(self, rest: str) -> bool:
        self.reset()
        return True

    def _set_system(self, rest: str) -> bool:
        self._system = rest or None
        return self._reset(rest)

    def _save(self, rest: str) -> bool:
        """Adds a line to a file: `train` reads it."""
        spoken = [message for message in self.messages if message["role"] != "system"]
        if not rest or not spoken:
            return self._say("/save FILE, once something was said")
        try:
            with Path(rest).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return self._say(f"{rest}: cannot be written: {error.strerror}")
        return self._say(f"saved to {rest}")

    def _help(self, rest: str) -> bool:
        return self._say(HELP)

    def _say(self, text: str) -> bool:
        print(printable(text, keep="\n"), file=sys.stderr)
        return True
