"""A real headless Chromium for tests, driven over the WebDriver protocol with nothing but the standard library."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
TRIES = 3
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver installed")


class Browser:
    """One window. `log` holds what the console and the network said since it was last asked."""

    def __init__(self, address: str):
        self.address = address
        options = {
            "binary": CHROMIUM,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                     "--window-size=1280,1000", "--autoplay-policy=no-user-gesture-required"],
        }  # fmt: skip
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session = self.send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def send(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def post(self, path: str, body: dict):
        return self.send("POST", f"/session/{self.session}{path}", body)

    def open(self, url: str) -> None:
        self.post("/url", {"url": url})

    def run(self, script: str, *arguments):
        """What the script returns in the page."""
        return self.post("/execute/sync", {"script": script, "args": list(arguments)})

    def wait_for(self, script: str, seconds: float = 20):
        """What the script returns once that is true."""
        end = time.monotonic() + seconds
        while not (answer := self.run(script)):
            assert time.monotonic() < end, f"never true within {seconds} s: {script}"
            time.sleep(0.1)
        return answer

    def log(self, kind: str) -> list[dict]:
        return self.post("/se/log", {"type": kind})

    def requests(self) -> list[str]:
        """Addresses of every request the page made, without those of its own data."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, path, height: int | None = None) -> None:
        if height:
            self.post("/window/rect", {"width": 1280, "height": height})
            time.sleep(0.5)
        path.write_bytes(base64.b64decode(self.send("GET", f"/session/{self.session}/screenshot")))

    def close(self) -> None:
        self.send("DELETE", f"/session/{self.session}")


def started() -> tuple[subprocess.Popen, str]:
    """(a driver, its port). It looks for a free port and may lose it to somebody else before it listens: then again."""
    for _ in range(TRIES):
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = []
        for line in driver.stdout:
            if "successfully on port" in line:
                return driver, line.rsplit(" ", 1)[1].rstrip(".\n")
            said.append(line)
        driver.wait(timeout=20)
    raise RuntimeError(f"{DRIVER} does not start: {''.join(said)}")


@contextmanager
def browser():
    """A Browser; it and its driver are gone at the end."""
    driver, port = started()
    try:
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(timeout=20)
