"""Servers under load: started, waited for, loaded through `dsctl bench`, stopped."""
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from machine import ROOT

# DSD_BIN: a folder with other builds of both.
PROGRAMS = Path(os.environ.get("DSD_BIN") or ROOT / "target/release")
DSD = PROGRAMS / "dsd"
DSCTL = PROGRAMS / "dsctl"
START_S_MAX = 300
STOP_S_MAX = 40
LOAD_S_MAX = 600


class Failed(Exception):
    """A program did not do what it was started for."""


def end_in_order():
    """Makes SIGTERM an exception, so that servers are stopped on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A server program in a `with` block; inside, it has said that it is ready."""

    # Seconds that it has to end by itself.
    stop_s_max = STOP_S_MAX

    def __init__(self, command, ready_path, folder=None, env=None):
        self.port = free_port()
        self.folder = folder
        self.env = env
        self.ready_path = ready_path
        self.command = [str(c).replace("{port}", str(self.port)) for c in command]

    def __enter__(self):
        self.log = tempfile.TemporaryFile()
        start = time.monotonic()
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, env=self.env)
        try:
            while not self.is_ready():
                if self.process.poll() is not None:
                    raise Failed(f"{self.command[0]} ended with {self.process.returncode}: {self.last_words()}")
                if start + START_S_MAX < time.monotonic():
                    raise Failed(f"{self.command[0]} is not ready after {START_S_MAX} s: {self.last_words()}")
                time.sleep(0.005)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - start
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def pid(self):
        return self.process.pid

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def is_ready(self):
        """Whether the server answers 200 to its readiness path."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", self.ready_path)
            status = connection.getresponse().status
            connection.close()
            return status == 200
        return False

    def get(self, path):
        """The body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        body = connection.getresponse().read().decode()
        connection.close()
        return body

    def whole_log(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def last_words(self):
        return self.whole_log()[-2000:]

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(self.stop_s_max)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()

    def load(self, clients, requests, n_prompt=64, n_output=32, seed=0, *more):
        """A closed loop of `dsctl bench`; its report, and the cores that others took. llama-server closes connections after a streamed
        answer without saying so, hence a connection for each request."""
        command = [DSCTL, "bench", "--json", "--http", self.url, "--concurrency", clients, "--requests", requests, "--prompt-len", n_prompt,
                   "--output-len", n_output, "--ignore-eos", "--reconnect", "--seed", seed, *more]
        own, others = machine.cpu_of(self.pid), machine.Others()
        ran = machine.run(command, LOAD_S_MAX)
        if ran.status != 0:
            raise Failed(f"dsctl bench: {ran.out[-500:]}{ran.err[-500:]}\n{self.last_words()}")
        report = json.loads(ran.out)
        report["others"] = others.cores(machine.cpu_of(self.pid) - own + ran.cpu_s)
        return report


def dsd(model, *more):
    """`dsd dev` with a state folder of its own."""
    folder = tempfile.TemporaryDirectory(prefix="dsd-bench-")
    return Server([DSD, "dev", "--model", model, "--http", "127.0.0.1:{port}", "--quic", f"127.0.0.1:{free_port()}", "--state",
                   Path(folder.name) / "state", "--activations", "int8", *more], "/ready", folder)


def llama_server(program, model, n_threads):
    """llama-server with 16 slots of 512 tokens."""
    return Server([program, "-m", model, "--host", "127.0.0.1", "--port", "{port}", "-np", 16, "-c", 8192, "-t", n_threads], "/health")
