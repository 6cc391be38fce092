"""Consumers to be killed: forks one for each line of stdin (quicker than a start), and tells its process id."""

import os
import signal
import sys

import redis
from kombu import Consumer, Exchange, Queue

from pool.worker.transport import ShardConnection


def consume(url: str, queues: list[str], options: dict[str, object]) -> None:
    """Note each message as done, then acknowledge it; for ever."""
    with redis.Redis.from_url(url) as client, ShardConnection(url, transport_options=options) as connection:

        def done(body: object, message: object) -> None:
            client.sadd("done", str(body))
            message.ack()  # type: ignore[attr-defined]

        exchange = Exchange("shards", type="direct")
        consumed = [Queue(name, exchange, routing_key=name) for name in queues]
        connection.default_channel.basic_qos(0, 8, False)
        with Consumer(connection.default_channel, consumed, callbacks=[done], accept=["json", "text/plain"]):
            while True:
                connection.drain_events()


def main() -> None:
    url, claimant, *queues = sys.argv[1:]
    options = {"priority_steps": [0], "namespace": "t", **({"claimant": claimant} if claimant else {})}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.stdin.close()
            consume(url, queues, options)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
