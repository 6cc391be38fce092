"""What mitogen's Python on the host is sent to call; standard library only."""

import subprocess


def run(command: str) -> tuple[int, bytes]:
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.run(["/bin/sh", "-c", command], stdin=none, stdout=pipe, stderr=subprocess.STDOUT, check=False)
    return process.returncode, process.stdout


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
