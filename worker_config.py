"""Composition root: the environment -> settings -> `app`.

``celery -A worker_config worker``, ``celery -A worker_config beat``; in a producer ``import worker_config`` first.
"""

from celery import Celery

from pool import Settings, install
from pool.embedded import is_redis, with_urls

settings = with_urls(Settings.from_env())

app = Celery(
    "warm_pool",
    broker=settings.broker_url,
    backend=settings.result_url,
    include=["tasks.builds", "tasks.turns", "tasks.maintenance"],
)
app.conf.update(
    accept_content=["json"],
    task_serializer="json",
    result_serializer="json",
    result_expires=3600,  # seconds
    task_track_started=True,
    broker_connection_retry_on_startup=True,
    worker_send_task_events=True,
    enable_utc=True,
)
if is_redis(str(settings.broker_url)):
    # One Redis list for each queue instead of four: a node consumes 64 queues and more.
    app.conf.broker_transport_options = {"priority_steps": [0]}
install(app, settings)
