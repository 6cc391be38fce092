"""``python -m pool.demo``: what the package promises, on embedded parts, with nothing installed but Python packages.

An embedded Valkey, a loopback SSH server, worker nodes and beat, all as real processes: `stage`. What is shown on it:
`affinity` (one warm connection for each user), ``--kill``: `takeover` (a node is killed, nothing is lost),
``--agents``: `agents` (chats with real coding agents, which remember).
"""
