"""An app that was there before the pool: routes, queues, a beat entry and tasks of its own."""

from typing import Any

from celery import Celery
from kombu import Queue

from pool import PooledTask, Settings, install
from pool.embedded import with_urls

settings = with_urls(Settings.from_env())
app = Celery("existing", broker=settings.broker_url, backend=settings.result_url)
app.conf.update(
    task_default_queue="main",
    task_queues=[Queue("main"), Queue("mail")],
    task_routes={"existing.send_mail": {"queue": "mail"}},
    beat_schedule={"newsletter": {"task": "existing.send_mail", "schedule": 1.0, "args": ("all",)}},
)
install(app, settings)


@app.task(bind=True, name="existing.add")
def add(self: Any, a: int, b: int) -> dict[str, Any]:
    """Something plain."""
    return {"sum": a + b, "queue": self.request.delivery_info["routing_key"], "node": self.request.hostname}


@app.task(bind=True, name="existing.send_mail")
def send_mail(self: Any, to: str) -> dict[str, Any]:
    """Something with a route of its own."""
    return {"to": to, "queue": self.request.delivery_info["routing_key"], "node": self.request.hostname}


@app.task(base=PooledTask, bind=True, name="existing.build", key="customer")
def build(self: PooledTask, customer: str, command: str) -> dict[str, Any]:
    """What the pool was installed for."""
    with self.backend() as backend:
        output = backend.exec(command).output
    return {"output": output, "queue": self.request.delivery_info["routing_key"], "node": self.request.hostname}
