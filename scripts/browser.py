"""A headless Chromium that is told what to do through a pipe: opens a page, waits for words on it, takes its picture.

`--dump-dom` and `--screenshot` would do without, but for two things: TensorBoard's pages keep most of what they show in
shadow trees, which a dump leaves out, and a page is done when its words are there, not after some time.

Source: the Chrome DevTools Protocol, over `--remote-debugging-pipe`: JSON messages that end with a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-3d-apis", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# So long a page that is busy may take to say what its words are.
ANSWER_SECONDS = 10
# All words that a reader sees, those in shadow trees too.
WORDS = """(function words(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent;
  if (["SCRIPT", "STYLE", "TEMPLATE"].includes(node.nodeName)) return "";
  const children = [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes];
  return children.map(words).join(" ");
})(document.body)"""


def find() -> str | None:
    """The browser's path; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One window.

    Raises:
        TimeoutError: it does not answer.
    """

    def __init__(self, path: str, wide: int, high: int, seconds: float = 40) -> None:
        self._until = time.monotonic() + seconds
        self._folder = tempfile.TemporaryDirectory()
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # The shell gives the pipes the numbers under which the browser looks for them.
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        options = (
            *FLAGS,
            "--remote-debugging-pipe",
            f"--window-size={wide},{high}",
            f"--user-data-dir={self._folder.name}",
        )
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", path, *options, "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, ""
        try:
            self._session = self._ask("Target.attachToTarget", targetId=self._window(), flatten=True)["sessionId"]
            self._ask("Emulation.setDeviceMetricsOverride", width=wide, height=high, deviceScaleFactor=1, mobile=False)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        self._process.kill()
        self._process.wait(20)
        for _ in range(20):
            try:
                self._folder.cleanup()
                return
            except OSError:  # its helpers are still on their way out
                time.sleep(0.1)

    def open(self, address: str) -> None:
        self._ask("Page.navigate", url=address)

    def words(self) -> str:
        """What the page says."""
        found = self._ask("Runtime.evaluate", expression=WORDS, returnByValue=True)
        return str(found.get("result", {}).get("value", ""))

    def _words_or_none(self) -> str:
        """What the page says; nothing where it is being loaded, and its answer was lost with what was there before."""
        until, self._until = self._until, min(self._until, time.monotonic() + ANSWER_SECONDS)
        try:
            return self.words()
        except TimeoutError:
            return ""
        finally:
            self._until = until

    def wait_for(self, *words: str) -> str:
        """What the page says once it says all of these."""
        while True:
            time.sleep(1)  # to ask takes time from the page, which is busy
            said = self._words_or_none()
            missing = [each for each in words if each not in said]
            if not missing:
                return said
            if time.monotonic() > self._until:
                raise TimeoutError(f"the page never said {missing}: {' '.join(said.split())[:2000]}")

    def picture(self) -> bytes:
        """What the window shows, as a PNG file."""
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])

    def _window(self) -> str:
        """The window that the browser opens at its start."""
        while True:
            for target in self._ask("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return str(target["targetId"])
            if time.monotonic() > self._until:
                raise TimeoutError("the browser opened no window")
            time.sleep(0.1)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            pass  # events
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        found: dict[str, Any] = answer["result"]
        return found

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, self._until - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError("the browser ended" if ready else "the browser does not answer")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found
