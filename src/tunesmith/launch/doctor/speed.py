"""Bandwidth and latency between two nodes over plain TCP.

It takes 8 MB: a test with 16 GB has frozen a node. Standard library alone: pair.py runs
`serve_speed` on the other node.
"""

from __future__ import annotations

import signal
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

LIMIT = 20  # seconds, for all of it
SECONDS = 2.0  # of sending
STREAMS = 4
PINGS = 200
CHUNK = 1 << 20  # bytes


def serve_speed() -> None:
    """On the other node: listen at an address, the first word, and print the port and the time.

    It ends within LIMIT seconds.
    """
    signal.alarm(LIMIT)
    family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    with (
        socket.create_server((sys.argv[1], 0), family=family) as server,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        print(server.getsockname()[1], time.time(), flush=True)
        echo, _ = server.accept()
        # Nagle's algorithm would hold a single byte back, and it would be measured.
        echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The echo ends when the other side closes; then come the streams.
        while byte := echo.recv(1):
            echo.sendall(byte)
        for _ in range(STREAMS):
            pool.submit(_sink, server.accept()[0])


def _sink(stream: socket.socket) -> None:
    """Take in what comes, and answer with its count of bytes."""
    buffer = bytearray(CHUNK)
    total = 0
    while count := stream.recv_into(buffer):
        total += count
    stream.sendall(total.to_bytes(8, "big"))
    stream.close()


def measure_speed(address: str, port: int) -> tuple[float, float, float]:
    """GB/s, the median round trip in microseconds, the idle share of this machine's CPUs.

    OSError where the other node does not answer.
    """
    with socket.create_connection((address, port), timeout=5) as echo:
        echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(PINGS):
            began = time.perf_counter()
            echo.sendall(b".")
            echo.recv(1)
            trips.append(time.perf_counter() - began)
    first_idle, first_total = _cpu_ticks()
    began = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        total = sum(pool.map(_send, [(address, port)] * STREAMS))
    seconds = time.monotonic() - began
    last_idle, last_total = _cpu_ticks()
    idle = (last_idle - first_idle) / max(last_total - first_total, 1)
    return total / max(seconds, 1e-9) / 1e9, statistics.median(trips) * 1e6, idle


def _send(place: tuple[str, int]) -> int:
    """Send for SECONDS -> the bytes that arrived."""
    chunk = bytes(CHUNK)
    end = time.monotonic() + SECONDS
    with socket.create_connection(place, timeout=5) as stream:
        while time.monotonic() < end:
            stream.sendall(chunk)
        stream.shutdown(socket.SHUT_WR)
        # The other side counts: this kernel still holds a part of what was sent.
        return int.from_bytes(stream.recv(8), "big")


def _cpu_ticks() -> tuple[int, int]:
    """Idle and all ticks of this machine's CPUs so far."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(word) for word in file.readline().split()[1:]]
    # Waiting for a disk, the fifth, is idle too.
    return ticks[3] + ticks[4], sum(ticks)
