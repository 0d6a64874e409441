"""A page in headless Chromium, driven by its DevTools protocol: scripts, errors, screenshots."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page:
    """Opens a URL in a context, `width` pixels wide; `errors` are those of console and scripts."""

    def __init__(self, url: str, profile: Path, width: int, height: int = 900) -> None:
        self._url, self._profile, self._size = url, profile, (width, height)
        self.errors: list[str] = []
        self._number = 0

    def __enter__(self) -> "Page":
        from websocket import create_connection

        width, height = self._size
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
        ]
        options += [
            f"--window-size={width},{height}",
            f"--user-data-dir={self._profile}",
            "about:blank",
        ]
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port = self._port()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            (target,) = [t for t in json.load(answer) if t["type"] == "page"]
        self._socket = create_connection(target["webSocketDebuggerUrl"], timeout=300)
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")
        # windows without a screen are no narrower than 500 pixels: a phone is emulated
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        self._call("Page.navigate", url=self._url)
        self.wait_for("document.readyState == 'complete'")
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def script(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 300) -> None:
        end = time.time() + seconds
        while not self.script(expression):
            assert time.time() < end, expression
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        if message.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append(json.dumps(parameters["args"]))

    def _port(self) -> int:
        file, end = self._profile / "DevToolsActivePort", time.time() + 300
        while time.time() < end:
            if file.exists() and (lines := file.read_text().splitlines()):
                return int(lines[0])
            time.sleep(0.1)
        raise TimeoutError("Chromium does not start")
