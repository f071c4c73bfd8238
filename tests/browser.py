"""Pages in a real Chromium, without a window and without a network."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

MUST = "CALIDROP_NEEDS_CHROMIUM"  # where it is set, a missing Chromium is a failure
SHOTS = "CALIDROP_SCREENSHOTS"  # a folder for screenshots, to look at them; else the test's own
FLAGS = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars", "no-first-run"),
    *("disable-quic", "disable-background-networking", "disable-component-update", "disable-sync"),
)
ASIDE = "data:", "blob:", "about:", "chrome:", "devtools:"  # requests that leave nothing


def start() -> webdriver.Chrome:
    """Skips the test where there is no Chromium."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(found):
        assert MUST not in os.environ, f"no chromium or no chromedriver, and {MUST} is set"
        pytest.skip("no chromium or no chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = Options()
    options.binary_location = str(found[0])
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, Service(str(found[1])))


class Browser:
    """One page at a time. `check` fails for any message on the console that is an error or a warning, and for any
    request beyond the page's own file; it runs at each `open` and at the end."""

    def __init__(self, driver: webdriver.Chrome, folder: Path):
        self.driver, self.folder = driver, folder
        self.page = ""

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.check()
        self._tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                   mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._tell("Emulation.setEmulatedMedia", features=[scheme])
        self.page = file.resolve().as_uri()
        self.driver.get(self.page)

    def forget(self) -> None:
        """What pages have stored: asked of the browser, as what a page clears may still be there for the next."""
        self._tell("Storage.clearDataForOrigin", origin="file://", storageTypes="local_storage")

    def run(self, script: str, *args: Any) -> Any:
        """JavaScript, the body of a function."""
        return self.driver.execute_script(script, *args)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(x => x.textContent.trim())", css)

    def click(self, css: str) -> None:
        self.one(css).click()

    def choose(self, css: str, option: str) -> None:
        """By its text, in a select element."""
        (found,) = [o for o in self.one(css).find_elements(By.TAG_NAME, "option") if o.text == option]
        found.click()

    def hover(self, css: str) -> None:
        ActionChains(self.driver).move_to_element(self.one(css)).perform()

    def wait(self, script: str, *args: Any, seconds: float = 10) -> Any:
        """Until the JavaScript returns something true."""
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: self.run(script, *args))

    def wide(self) -> list[str]:
        """What makes the page as a whole wider than the screen: nothing, if all is well."""
        return self.run("""
            const width = document.documentElement.clientWidth;
            if (document.documentElement.scrollWidth <= width) return [];
            return [...document.querySelectorAll("body *")].filter(x => x.getBoundingClientRect().right > width + 1)
                .map(x => `${x.tagName} ${x.id} ${x.className}`).slice(0, 10)""")

    def shoot(self, name: str, whole: bool = True) -> Path:
        """A screenshot. whole: the page to its end, not what the window shows."""
        folder = Path(os.environ.get(SHOTS) or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        size = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight, innerHeight]")
        if whole:
            self._tell("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                       mobile=size[0] < 600)  # fmt: skip
        path = folder / f"{name}.png"
        path.write_bytes(self.driver.get_screenshot_as_png())
        if whole:
            self._tell("Emulation.setDeviceMetricsOverride", width=size[0], height=size[2], deviceScaleFactor=1,
                       mobile=size[0] < 600)  # fmt: skip
        return path

    def check(self) -> None:
        said, events = self.driver.get_log("browser"), self.driver.get_log("performance")  # both are emptied
        bad = [entry for entry in said if entry["level"] in ("SEVERE", "WARNING")]
        assert not bad, bad
        told = [json.loads(entry["message"])["message"] for entry in events]
        sent = [e["params"]["request"]["url"] for e in told if e["method"] == "Network.requestWillBeSent"]
        beyond = [url for url in sent if url.partition("#")[0] != self.page and not url.startswith(ASIDE)]
        assert not beyond, beyond

    def _tell(self, command: str, **params: Any) -> None:
        self.driver.execute_cdp_cmd(command, params)


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    driver = start()
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome, tmp_path: Path) -> Iterator[Browser]:
    it = Browser(chromium, tmp_path)
    it.forget()
    yield it
    it.check()
    chromium.get("about:blank")
