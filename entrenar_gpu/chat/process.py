"""The asking side of worker.py: one process for all templates, started when first needed and kept."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from entrenar_gpu.chat.sandbox import holds_marks
from entrenar_gpu.chat.worker import CPU_SECONDS, Service, TemplateSource

WALL_SECONDS = 60.0  # without an answer; the machine may be busy with other things
_START = "import sys; sys.path[:] = sys.argv[2:]; from entrenar_gpu.chat.worker import main; main(float(sys.argv[1]))"


_MARK = "\\ufdd"  # as JSON writes the characters that mark places


class _Ended(Exception):
    """The process is gone, and why."""


class TemplateProcess:
    """Asks a process of its own where the platform can bound one, else this process."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._pending = bytearray()
        self._here = Service() if sys.platform == "win32" or not sys.executable else None

    def ask(self, ask: str, template: TemplateSource, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """An answer for each row, up to and with the first that ended the process."""
        with self._lock:
            if self._here is None and not self._running():
                self._start()
            request = {"ask": ask, "template": asdict(template), "rows": len(rows)}
            lines = [json.dumps(row) for row in rows]
            for at, line in enumerate(lines):
                if _MARK in line and holds_marks(rows[at]):
                    refused = {"error": "a message holds a Unicode noncharacter (U+FDD0 to U+FDD5)", "at_fault": False}
                    return [*({} for _ in range(at)), refused]
            if self._here is not None:
                return list(self._here.answers(request, lines))
            try:
                return self._exchange([json.dumps(request), *lines])
            except BaseException:
                self.stop()  # in the middle of an exchange nothing can follow
                raise

    def stop(self) -> None:
        """End the process, if there is one; the next question starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def _running(self) -> bool:
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def _start(self) -> None:
        self.stop()
        command = [
            sys.executable,
            "-I",
            "-c",
            _START,
            str(self._cpu_seconds),
            *(path or os.getcwd() for path in sys.path),
        ]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing)
        except OSError:  # no process to be had: today's limits of the machine
            self._here = Service()
        self._owner, self._pending = os.getpid(), bytearray()

    def _exchange(self, lines: Sequence[str]) -> list[dict[str, Any]]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        answers: list[dict[str, Any]] = []
        try:
            process.stdin.write(("\n".join(lines) + "\n").encode())
            process.stdin.flush()
            while len(answers) < len(lines) - 1:
                answers.append(self._answer())
        except (_Ended, BrokenPipeError) as error:
            reason = str(error) if isinstance(error, _Ended) else self._why()
            self.stop()
            answers.append({"error": f"chat template: {reason}", "at_fault": True})
        return answers

    def _answer(self) -> dict[str, Any]:
        """The next answer that the process writes, see worker.py."""
        until = time.monotonic() + WALL_SECONDS
        while (end := self._pending.find(b"\n")) < 0:
            self._read(until)
        answer: dict[str, Any] = json.loads(self._pending[:end])
        if (length := answer.pop("bytes", None)) is not None:
            while len(self._pending) <= end + length:
                self._read(until)
            end += length
            answer["text"] = self._pending[end - length + 1 : end + 1].decode("utf-8", "surrogatepass")
        del self._pending[: end + 1]
        return answer

    def _read(self, until: float) -> None:
        """Put more of what the process writes to what is pending. Raises _Ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout.fileno()
        if not select.select([stream], [], [], max(0.0, until - time.monotonic()))[0]:
            raise _Ended(f"no answer within {WALL_SECONDS:.0f} s")
        part = os.read(stream, 1 << 20)
        if not part:
            raise _Ended(self._why())
        self._pending += part

    def _why(self) -> str:
        """What ended the process."""
        assert self._process is not None
        status = self._process.wait()
        if sys.platform != "win32" and status == -signal.SIGPROF:
            return "takes too long"
        return f"ended its process ({signal.Signals(-status).name if status < 0 else f'status {status}'})"


TEMPLATES = TemplateProcess()
atexit.register(TEMPLATES.stop)
