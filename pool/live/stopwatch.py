"""How long a coroutine keeps its thread busy: without what others do while it waits."""

from collections.abc import Coroutine, Generator
from time import thread_time
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Stopwatch(Generic[T]):
    """Await it instead of the coroutine; ``seconds``: CPU time of its own steps."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.seconds = 0.0
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, T]:
        step: Any = self._coroutine.send
        argument: Any = None
        while True:
            started = thread_time()
            try:
                waits_for = step(argument)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                self.seconds += thread_time() - started
            try:
                argument = yield waits_for
                step = self._coroutine.send
            except BaseException as error:
                argument = error
                step = self._coroutine.throw
