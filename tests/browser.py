"""Pages in headless Chromium, through its DevTools protocol on two pipes: no driver, no package, no port.

python tests/browser.py PAGE.html [PICTURE.png WIDTH HEIGHT light|dark]     its opening time, and a picture of it
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMAND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
FRAMES = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
PATIENCE = 60  # seconds for one answer; a loaded machine may take a while to start the browser
# Says when the page is ready and its picture was drawn, in milliseconds since the browser was told to open it.
CLOCK = """new Promise((done) => {
  const shown = () => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())));
  const ready = () => document.documentElement && document.documentElement.dataset.ready;
  if (ready()) shown();
  else new MutationObserver((_, own) => { if (ready()) { own.disconnect(); shown(); } })
    .observe(document, { subtree: true, attributes: true, attributeFilter: ["data-ready"] });
})"""


@dataclass
class Opened:
    """A page that is ready. milliseconds: until it was; complaints: its errors, words on the console and requests."""

    browser: "Browser"
    target: str
    session: str
    milliseconds: float = 0.0
    complaints: list[str] = field(default_factory=list)
    is_phone: bool = False

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def tap(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Scroll the element into sight and touch or click it at these shares of its size."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"({box}.scrollIntoView({{block: 'center'}}), {FRAMES})")
        where = self.ask(f"{box}.getBoundingClientRect().toJSON()")
        point = {"x": where["x"] + x * where["width"], "y": where["y"] + y * where["height"]}
        if self.is_phone:
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        for kind in ("mouseMoved", "mousePressed", "mouseReleased") if not self.is_phone else ():
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **point)
        self.ask(FRAMES)

    def choose(self, selector: str, option: int) -> None:
        box = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"({box}.selectedIndex = {option}, {box}.dispatchEvent(new Event('change')))")

    def resize(self, width: int, height: int = 900) -> None:
        """A window narrower than 600 is a phone's, with fingers instead of a mouse."""
        self.is_phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1 + self.is_phone, "mobile": self.is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=self.is_phone)
        self.ask(FRAMES)

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def picture(self, path: Path) -> None:
        """The whole page, however long."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=size | {"scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))


class Browser:
    """One Chromium process; `open` gives each page a tab of its own."""

    def __init__(self, profile: Path):
        assert COMMAND is not None, "no Chromium here"
        (ours, its_output), (its_input, our_end) = os.pipe(), os.pipe()
        self.incoming, self.outgoing, self.pending, self.number = ours, our_end, b"", 0
        self.tabs: dict[str, Opened] = {}
        # It reads from descriptor 3 and writes to 4, whatever numbers ours have.
        pipes = f'exec "$@" 3<&{its_input} 4>&{its_output}'
        flags = (*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe")
        command = ["bash", "-c", pipes, "bash", COMMAND, *flags]
        self.process = subprocess.Popen(command, pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL)
        os.close(its_output), os.close(its_input)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self.outgoing, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> Opened:
        """The page in a window of this size, once it is ready and was drawn."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.tabs[session] = Opened(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=path.resolve().as_uri())
        page.milliseconds = page.ask(CLOCK)
        return page

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            os.close(self.incoming), os.close(self.outgoing)

    def _receive(self) -> dict[str, Any]:
        """The next message, an answer or an event."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self.pending:
            ready, _, _ = select.select([self.incoming], [], [], max(0, deadline - time.monotonic()))
            part = os.read(self.incoming, 2**20) if ready else b""
            assert part, "the browser ended" if ready else f"the browser said nothing for {PATIENCE} s"
            self.pending += part
        message, _, self.pending = self.pending.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what a page may not do: an error, a word on the console, a request beyond its own file."""
        page, method, said = self.tabs.get(event.get("sessionId", "")), event.get("method"), event.get("params", {})
        if page is None:
            return
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            page.complaints.append(json.dumps(said))
        elif method == "Network.requestWillBeSent" and said["type"] != "Document":
            url = said["request"]["url"]
            if not url.startswith("data:"):
                page.complaints.append(url)


def main(page: str, picture: str = "", width: str = "1200", height: str = "900", scheme: str = "light") -> None:
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        opened = browser.open(Path(page), int(width), int(height), scheme == "dark")
        if picture:
            opened.picture(Path(picture))
        browser.close()
        print(json.dumps({"milliseconds": round(opened.milliseconds), "complaints": opened.complaints}))


if __name__ == "__main__":
    main(*sys.argv[1:])
