"""The thread that runs the model: requests of all connections in, what is new of their answers out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from entrenar_gpu.errors import DeviceLost, UserError
from entrenar_gpu.infer import Answer, Delta, Request, Scheduler

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many answers wait as may."""


@dataclass
class Ticket:
    """A request's place: its answers, prompt by prompt, and what is new of them, as (prompt's index, delta)."""

    requests: Sequence[Request]
    news: asyncio.Queue[tuple[int, Delta]] = field(default_factory=asyncio.Queue)
    answers: list[list[Answer]] = field(default_factory=list)


class Engine:
    """Owns a scheduler: nothing else may touch it, or its decoder, between `start` and `close`.

    Of the answers that were asked for and have not ended, as many run as there are slots, and `queue_limit` wait.
    """

    def __init__(self, scheduler: Scheduler, queue_limit: int) -> None:
        self.scheduler = scheduler
        self._limit = scheduler.decoder.slots + queue_limit
        self.reserved = 0  # answers asked for that have not ended
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._lock = threading.Lock()
        self.broken: str | None = None  # why there will be no more answers

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End what runs, and the thread."""
        self._commands.put(None)
        self._thread.join()

    @contextlib.contextmanager
    def place(self, answers: int) -> Iterator[None]:
        """Room for so many answers while the block runs. Raises QueueFull where there is none."""
        with self._lock:
            if self.reserved and self.reserved + answers > self._limit:
                raise QueueFull
            self.reserved += answers
        try:
            yield
        finally:
            with self._lock:
                self.reserved -= answers

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Have requests answered. Raises UserError, with none of them begun, where one cannot be."""
        loop, ticket = asyncio.get_running_loop(), Ticket(requests)
        done: Future[None] = Future()

        def deliver_to(index: int) -> Callable[[Delta], None]:
            def deliver(delta: Delta) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever listened
                    loop.call_soon_threadsafe(ticket.news.put_nowait, (index, delta))

            return deliver

        def begin() -> None:
            try:
                if self.broken is not None:
                    raise UserError(self.broken)
                for index, request in enumerate(requests):
                    ticket.answers.append(self.scheduler.submit(request, deliver_to(index)))
            except BaseException as error:
                self._drop(ticket)
                done.set_exception(error)
            else:
                done.set_result(None)

        self._commands.put(begin)
        try:
            await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Free the slots of a ticket's answers, whether they have ended or not."""
        self._commands.put(lambda: self._drop(ticket))

    def _drop(self, ticket: Ticket) -> None:
        for answers in ticket.answers:
            self.scheduler.cancel(answers)

    def _run(self) -> None:
        busy = False
        while True:
            try:
                command = self._commands.get(block=not busy)
            except queue.Empty:
                busy = self._step()
                continue
            if command is None:
                self.scheduler.fail_all("the server is shutting down")
                return
            command()
            busy = True

    def _step(self) -> bool:
        """A step of the scheduler; what goes wrong in it has been told to everyone whom it concerns."""
        try:
            return self.scheduler.step()
        except DeviceLost as error:
            self.broken = str(error)
        except UserError as error:
            _log.error("%s", error)
        except Exception:
            _log.exception("a step of the model failed")
        return True
