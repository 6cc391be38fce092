"""A Celery app that has tasks of its own, plus a pool of warm backends: the marked lines are all it takes.

celery -A shop worker            # in this folder
python -c "import shop; print(shop.ask.delay('chat-7', 'hello').get())"
"""

import asyncio
import sys
from typing import Any

from celery import Celery

from pool import Backend, BackendUnavailable, PooledTask, Settings, install  # 1
from pool.embedded import with_urls

settings = with_urls(Settings.from_env())
app = Celery("shop", broker=settings.broker_url, backend=settings.result_url)
app.conf.task_routes = {"shop.send_receipt": {"queue": "mail"}}  # what the app had before stays
app.conf.task_create_missing_queues = True


class Assistant(Backend):
    """2: a backend of our own, a program that is slow to start and remembers what it was told.

    Here it is a few lines of Python behind a pipe; in real life a coding agent, a browser, a language server.
    """

    kind = "assistant"
    program = """
import sys
heard = []
for line in sys.stdin:
    heard.append(line.strip())
    print(f"{len(heard)}: {heard}", flush=True)
"""

    def __init__(self, greeting: str) -> None:
        super().__init__()
        self.greeting = greeting
        self.turn = asyncio.Lock()

    async def open(self) -> None:
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", self.program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        except OSError as error:
            raise BackendUnavailable(f"the assistant does not start: {error}", "setup", 5.0) from error

    async def close(self) -> None:
        if hasattr(self, "process") and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def check(self) -> None:
        if self.process.returncode is not None:
            raise BackendUnavailable("the assistant has ended", "lost", 0.0)

    async def aask(self, text: str) -> str:
        async with self.turn:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(f"{text}\n".encode())
            answer = await self.process.stdout.readline()
        if not answer:
            self.mark_lost()  # the next task, or this one's retry, gets a new assistant
            raise BackendUnavailable("the assistant ended while it was asked", "lost", 0.0)
        return f"{self.greeting} {answer.decode().strip()}"

    def ask(self, text: str) -> str:
        return self.run_sync(self.aask(text))  # task code is plain; the work happens on the pool's event loop


@app.task
def send_receipt(order: int) -> str:
    """A task as before: any worker, its own queue."""
    return f"receipt for order {order} sent"


@app.task(base=PooledTask, bind=True, key="chat_id")  # 3: this one is routed by its chat
def ask(self: Any, chat_id: str, text: str) -> str:  # noqa: ARG001 - the router reads it
    with self.backend() as assistant:
        return assistant.ask(text)


install(app, settings, backend_class=Assistant, default_config={"greeting": "you said"})  # 4
