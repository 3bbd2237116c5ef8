"""Bandwidth and latency between two nodes over plain TCP, with 8 MB: a test with 16 GB has frozen a node.

Standard library alone: pair.py runs `serve_speed` on the other node.
"""

from __future__ import annotations

import signal
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

LIMIT = 20  # seconds, for all of it
SECONDS, STREAMS, PINGS, CHUNK = 2.0, 4, 200, 1 << 20


def serve_speed() -> None:
    """On the other node: print port and time, take in what is sent to the address (the first word), end within LIMIT."""
    signal.alarm(LIMIT)
    family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    with (
        socket.create_server((sys.argv[1], 0), family=family) as server,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        print(server.getsockname()[1], time.time(), flush=True)
        echo = server.accept()[0]
        echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while byte := echo.recv(1):
            echo.sendall(byte)
        for _ in range(STREAMS):
            pool.submit(_sink, server.accept()[0])


def _sink(stream: socket.socket) -> None:
    buffer, total = bytearray(CHUNK), 0
    while count := stream.recv_into(buffer):
        total += count
    stream.sendall(total.to_bytes(8, "big"))
    stream.close()


def measure_speed(address: str, port: int) -> tuple[float, float, float]:
    """GB/s, the median round trip in microseconds, and the idle share of this machine's CPUs; OSError if it fails."""
    with socket.create_connection((address, port), timeout=5) as echo:
        echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(PINGS):
            begin = time.perf_counter()
            echo.sendall(b".")
            echo.recv(1)
            trips.append(time.perf_counter() - begin)
    before, begin = _cpu_ticks(), time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        total = sum(pool.map(_send, [(address, port)] * STREAMS))
    seconds, after = time.monotonic() - begin, _cpu_ticks()
    idle = (after[0] - before[0]) / max(after[1] - before[1], 1)
    return total / max(seconds, 1e-9) / 1e9, statistics.median(trips) * 1e6, idle


def _send(place: tuple[str, int]) -> int:
    chunk, end = bytes(CHUNK), time.monotonic() + SECONDS
    with socket.create_connection(place, timeout=5) as stream:
        while time.monotonic() < end:
            stream.sendall(chunk)
        stream.shutdown(socket.SHUT_WR)
        return int.from_bytes(stream.recv(8), "big")  # what arrived, not what this kernel holds


def _cpu_ticks() -> tuple[int, int]:
    """Idle and all ticks of this machine's CPUs so far."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(word) for word in file.readline().split()[1:]]
    return ticks[3] + ticks[4], sum(ticks)
