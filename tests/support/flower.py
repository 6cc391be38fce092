"""A real Flower with a password, for the nodes of a site."""

import json
import secrets
import socket
from collections.abc import Iterator
from typing import Any

import httpx

from tests.support.celery_nodes import CeleryContainer, WorkerNode
from tests.support.site import Site
from tests.support.waiting import wait_until

_TIMEOUT = 30.0  # seconds for one page

COLUMNS = "name,args,kwargs,state,runtime,worker"
"""What the list of tasks shows here. Flower's own choice has no arguments, and so no keys."""

TABLE = "/tasks/datatable?draw=1&start=0&length=100&order[0][column]=0&columns[0][data]=received&order[0][dir]=desc"
"""The rows of the list of tasks, as its page asks for them."""


class Flower(CeleryContainer):
    """``celery flower`` on a free loopback port; its password is in its environment, and on no command line."""

    ready_prompt = "Visit me at"

    def __init__(self, site: Site, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.user, self.password = "operator", secrets.token_urlsafe(12)
        arguments = ["-A", "worker_config", "flower", "--address=127.0.0.1", f"--port={port}"]
        env = {**site.env, "FLOWER_BASIC_AUTH": f"{self.user}:{self.password}"}
        super().__init__("flower", site.folder, [*arguments, f"--tasks-columns={COLUMNS}", *options], env)

    def get(self, path: str, *, password: str | None = None) -> httpx.Response:
        """Return the answer to a GET; with another *password* than the right one if wanted."""
        auth = (self.user, self.password if password is None else password)
        return httpx.get(self.url + path, auth=auth, timeout=_TIMEOUT, trust_env=False)

    def json(self, path: str) -> Any:
        return self.get(path).raise_for_status().json()

    def wait_for(self, *nodes: WorkerNode) -> None:
        """Wait until it has heard of the nodes and hears their events: it never learns of what was before."""
        names = {node.hostname() for node in nodes}

        def online() -> bool:
            found = self.json("/workers?json=1")["data"]
            return names <= {worker["hostname"] for worker in found if worker["status"]}

        wait_until(online, f"Flower knows {', '.join(names)}", _TIMEOUT, every=0.2)

    def wait_state(self, state: str, *ids: str) -> None:
        """Wait until it shows *state* for all of these tasks."""

        def shown() -> bool:
            tasks = self.json("/api/tasks")
            return all(tasks.get(task, {}).get("state") == state for task in ids)

        wait_until(shown, lambda: f"{state} of {ids}: {json.dumps(self.json('/api/tasks'))}", _TIMEOUT, every=0.2)

    def everything(self, *nodes: WorkerNode) -> Iterator[tuple[str, str]]:
        """Every page and every answer of the interface for programs that tells of these nodes and of their tasks."""
        tasks = list(self.json("/api/tasks"))
        names = [node.hostname() for node in nodes]
        pages = ["/", "/workers", "/workers?json=1", "/tasks", TABLE, "/broker", "/metrics"]
        pages += [f"/worker/{name}?limit=1000" for name in names] + [f"/task/{task}" for task in tasks]
        answers = ["/api/tasks", "/api/workers?refresh=1", "/api/queues/length", "/api/task/types"]
        answers += [f"/api/task/{what}/{task}" for task in tasks for what in ("info", "result")]
        for path in pages + answers:
            yield path, self.get(path).raise_for_status().text
