"""The local executor: a few worker processes that end with their parent, or the calling process itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from robustlayers.core.errors import UserError, system_text

__all__ = ["Apart", "Event", "OnEvent", "Queue", "Stopped", "Task", "apart", "execute", "perform"]


class Stopped(Exception):
    """Raised by a task that ended without a result for a known reason, such as divergence; the text is the reason."""


class Apart(Exception):
    """Raised by a task that several processes do, in a part that only one does: `error`, for which no other one waits."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def apart() -> Iterator[None]:
    """Say of an exception inside that the other processes have no part in what fails."""
    try:
        yield
    except Exception as error:
        raise Apart(error) from error


@dataclass(frozen=True)
class Task:
    """Work that a process does by itself: `function(*arguments, report)`; `needs` are keys of tasks that go first."""

    key: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()
    size: float = 1.0  # what it costs, to start the long ones first


@dataclass(frozen=True)
class Event:
    """Something that happened to a task: `started`, `done`, `stopped` or `failed` (facts: reason), or what it reported.

    Facts of `failed` hold `apart` where no other process waits for the task; see `Apart`.
    """

    key: str
    kind: str
    facts: Mapping[str, Any]


OnEvent = Callable[[Event], None]

_ENDS = ("done", "stopped", "failed")


def execute(tasks: list[Task], *, workers: int, threads: int, on_event: OnEvent) -> None:
    """Run tasks in an order that respects their needs, and call `on_event` with what happens, in this process.

    A task that raises is `stopped` or `failed`, those that need it are never started. With one worker everything runs
    in the calling process; a worker that dies makes its task `failed`. An exception, such as Ctrl-C, ends all workers.
    """
    if workers <= 1:
        _in_process(tasks, threads, on_event)
    else:
        _in_workers(tasks, min(workers, len(tasks)), threads, on_event)


class Queue:
    """Tasks that wait, are ready, or can never be."""

    def __init__(self, tasks: list[Task]) -> None:
        self.waiting = {task.key: task for task in tasks}
        self.done: set[str] = set()

    def next(self) -> Task | None:
        """Return the longest of the tasks that are ready, None if there is none now."""
        ready = [
            task
            for task in self.waiting.values()
            if not any(need in self.waiting or need not in self.done for need in task.needs)
        ]
        if not ready:
            return None
        task = max(ready, key=lambda task: task.size)
        del self.waiting[task.key]
        return task

    def put_back(self, task: Task) -> None:
        """Return a task that could not be started."""
        self.waiting[task.key] = task

    def finish(self, key: str, ok: bool) -> None:
        """Note the end of a task; if it failed, drop all that need it."""
        if ok:
            self.done.add(key)
            return
        dropped = {key}
        while more := {task.key for task in self.waiting.values() if dropped & set(task.needs)} - dropped:
            dropped |= more
        for name in dropped:
            self.waiting.pop(name, None)


def _in_process(tasks: list[Task], threads: int, on_event: OnEvent) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    queue = Queue(tasks)
    try:
        while task := queue.next():
            on_event(Event(task.key, "started", {}))
            end = perform(task, on_event)
            queue.finish(task.key, end.kind == "done")
            on_event(end)
    finally:
        torch.set_num_threads(before)


def perform(task: Task, on_event: OnEvent) -> Event:
    """Do a task and return how it ended; what it reports goes to `on_event`."""
    try:
        task.function(*task.arguments, lambda kind, facts: on_event(Event(task.key, kind, dict(facts))))
    except Stopped as stop:
        return Event(task.key, "stopped", {"reason": str(stop)})
    except Apart as failure:
        return Event(task.key, "failed", {**_reason(failure.error), "apart": True})
    except Exception as error:
        return Event(task.key, "failed", _reason(error))
    return Event(task.key, "done", {})


def _reason(error: Exception) -> dict[str, Any]:
    if isinstance(error, UserError):
        return {"reason": "; ".join(str(fault) for fault in error.faults)}
    if isinstance(error, OSError) and (text := system_text(error)):
        return {"reason": text}
    trace = "".join(traceback.format_exception(error))
    return {"reason": f"{type(error).__name__}: {error}", "trace": trace}


def _in_workers(tasks: list[Task], workers: int, threads: int, on_event: OnEvent) -> None:
    context = multiprocessing.get_context("spawn")
    queue = Queue(tasks)
    pool: dict[Connection, Any] = {}
    busy: dict[Connection, Task] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, threads), daemon=True)
            with _ctrl_c_held_back():
                process.start()
            theirs.close()
            pool[ours] = process
        idle = list(pool)
        while True:
            while idle and (task := queue.next()):
                connection = idle.pop(0)
                try:
                    connection.send(task)
                except OSError:  # it died while it had nothing to do
                    del pool[connection]
                    queue.put_back(task)
                    continue
                busy[connection] = task
                on_event(Event(task.key, "started", {}))
            if not busy:
                for task in queue.waiting.values():  # there is no one left to do them
                    on_event(Event(task.key, "failed", {"reason": "no worker process is left"}))
                return
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                task = busy[connection]
                try:
                    event = connection.recv()
                except (EOFError, ConnectionResetError):
                    pool[connection].join()
                    code = pool[connection].exitcode
                    event = Event(task.key, "failed", {"reason": f"the worker process died (exit code {code})"})
                    del busy[connection]
                    del pool[connection]
                else:
                    if event.kind in _ENDS:
                        del busy[connection]
                        idle.append(connection)
                if event.kind in _ENDS:
                    queue.finish(task.key, event.kind == "done")
                on_event(event)
    finally:
        for connection, process in pool.items():
            if connection in busy:
                process.kill()
            else:
                with suppress(OSError, BrokenPipeError):
                    connection.send(None)
        for process in pool.values():
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Let a process be started that never sees Ctrl-C, not even while it imports; here it is only delayed."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker(connection: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        if task is None:
            return
        try:
            connection.send(perform(task, connection.send))
        except OSError:  # the parent is gone
            return


def _end_with_parent() -> None:
    """Die as soon as the parent does, also by SIGKILL: an orphan must not go on writing into the store."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
