"""Remote control commands: ``celery -A app control pool_drain -d NODE``."""

from typing import Any

from celery.worker.control import control_command


@control_command()
def pool_drain(state: Any) -> dict[str, str]:
    """Hand all shards over to the other nodes and take none, until pool_undrain."""
    return _drain(state, on=True)


@control_command()
def pool_undrain(state: Any) -> dict[str, str]:
    """Take shards again."""
    return _drain(state, on=False)


def _drain(state: Any, *, on: bool) -> dict[str, str]:
    tenant = state.app.warm_pool.tenant
    if tenant is None:
        return {"error": "the shards of this node are fixed by POOL_NODE_SHARDS: stop it instead"}
    tenant.drain(on=on)
    return {"ok": "draining: its shards go to the other nodes" if on else "taking part again"}
