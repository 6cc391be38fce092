"""A worker to be killed: ``python -m tests.integration.agent_child CONFIG`` starts an agent, and waits.

*CONFIG* is JSON: ``root``, ``command`` and ``env`` of the agent, and ``ssh`` with what a connection to a host needs, or
null. With ``turn`` it opens a whole `AcpBackend` (on this machine) and works on that prompt; without, only the process.
"""

import json
import signal
import sys
from typing import Any

from pool.backends.local import LocalFilesystemBackend
from pool.backends.ssh import RemoteFilesystemBackend
from pool.chats import Chat
from pool.runtime import loop_thread


def main(config: dict[str, Any]) -> None:
    if config.get("turn"):
        from pool.backends.acp import AcpBackend

        agent = AcpBackend(config["command"], chat="c1", root_dir=config["root"], env=config["env"])
        loop_thread().run(agent.connect())
        agent.ensure_session(Chat("c1", "agent"))
        agent.prompt(config["turn"])
    root: Any = (
        RemoteFilesystemBackend("127.0.0.1", root_dir=config["root"], **config["ssh"])
        if config["ssh"]
        else LocalFilesystemBackend(config["root"])
    )
    process = loop_thread().run(root.astart(config["command"], env=config["env"]))
    signal.pause()
    del process


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
