"""Standard streams of other kinds than a terminal's: unbuffered, and non-blocking."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time

from tunesmith.host.streams import LastingOutput


def test_python_u_stays_unbuffered() -> None:
    made = "import sys, time; from tunesmith.host.streams import lasting; s = lasting(sys.stdout)"
    code = f"{made}; print('now', file=s); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    reader = threading.Timer(30, process.kill)
    reader.start()
    try:
        assert process.stdout.readline() == b"now\n"
        assert process.poll() is None
    finally:
        reader.cancel()
        process.kill()
        process.wait()


def test_nothing_is_lost_where_a_non_blocking_reader_is_behind() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got: list[bytes] = []

    def read() -> None:
        time.sleep(0.2)
        while piece := os.read(reader, 65536):
            got.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    data = bytes(range(256)) * 4096
    with io.BufferedWriter(LastingOutput(writer, "w")) as file:
        for start in range(0, len(data), 1000):
            file.write(data[start : start + 1000])
    thread.join(10)
    os.close(reader)
    assert b"".join(got) == data
