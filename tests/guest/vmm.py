"""A Firecracker process for the tests of the built-in guest: API over its unix socket, guest's console on its pipes."""

import http.client
import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

ANSWER_SECONDS = 60


def firecracker() -> str:
    """The binary under test: VMD_FIRECRACKER, else the one installed beside this Python."""
    return os.environ.get("VMD_FIRECRACKER") or str(Path(sys.prefix) / "bin" / "firecracker")


class _Api(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class Vmm:
    """One VMM. A context manager: the process is gone at the end, whatever happened."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._pending = b""
        self.process = subprocess.Popen(
            self._words(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=directory,
        )
        self._api = _Api(self._socket())
        self._wait_for_api()

    def _words(self) -> list[str]:
        return [firecracker(), "--api-sock", str(self._socket()), "--level", "Error"]

    def _socket(self) -> Path:
        return self.directory / "api.sock"

    def __enter__(self) -> "Vmm":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._api.close()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _wait_for_api(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                return self._api.connect()
            except OSError:
                self._api.close()
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise
                time.sleep(0.001)

    def call(self, method: str, path: str, **body: object) -> None:
        self._api.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = self._api.getresponse()
        text = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {text!r}")

    def line(self, seconds: float = ANSWER_SECONDS) -> str:
        """The next line of the console, without its end."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"no line within {seconds} s, got {self._pending!r}")
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                raise EOFError(f"the VMM ended, last words {self._pending!r}")
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)

    def ask(self, command: str) -> str:
        self.send(command.encode() + b"\n")
        return self.line()

    def boot(self, kernel: Path, mib: int, arguments: str = "", *, balloon: bool = False) -> str:
        """Starts the guest and returns its ready line."""
        self.call("PUT", "/machine-config", vcpu_count=1, mem_size_mib=mib)
        if balloon:
            self.call("PUT", "/balloon", amount_mib=0, deflate_on_oom=False)
        self.call("PUT", "/boot-source", kernel_image_path=str(kernel), boot_args=f"reboot=k {arguments}")
        self.call("PUT", "/actions", action_type="InstanceStart")
        return self.line()

    def snapshot(self) -> tuple[Path, Path]:
        """Pauses the guest and writes a full snapshot; returns the state file and the memory file."""
        state, memory = self.directory / "state", self.directory / "memory"
        self.call("PATCH", "/vm", state="Paused")
        self.call("PUT", "/snapshot/create", snapshot_type="Full", snapshot_path=str(state), mem_file_path=str(memory))
        return state, memory

    def load(self, state: Path, memory: Path) -> None:
        backend = {"backend_type": "File", "backend_path": str(memory)}
        self.call("PUT", "/snapshot/load", snapshot_path=str(state), mem_backend=backend, resume_vm=True)


def figures(answer: str) -> dict[str, int]:
    """The numbers of an `ok key=value ...` answer."""
    assert answer.startswith("ok "), answer
    pairs = (word.split("=", 1) for word in answer.split()[1:])
    return {key: int(value, 0) for key, value in pairs if key != "regions"}
