"""An app for tests: worker_config's composition, with settings that no variable reaches, from TEST_SETTINGS and TEST_CONF (JSON)."""

import json
import os
from dataclasses import replace

from celery import Celery

from pool import Settings, install
from pool.embedded import with_urls

settings = replace(with_urls(Settings.from_env()), **json.loads(os.environ.get("TEST_SETTINGS", "{}")))
app = Celery(
    "composed", broker=settings.broker_url, backend=settings.result_url, include=["tasks.builds", "tasks.maintenance"]
)
app.conf.update(
    {
        "task_track_started": True,
        "broker_transport_options": {"priority_steps": [0]},
        **json.loads(os.environ.get("TEST_CONF", "{}")),
    }
)
install(app, settings)
