"""A headless Chromium for the tests of pages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


def start_chromium(folder: Path, width: int = 1280, height: int = 900) -> Any:
    """A driver; skips where there is none. Nothing of it stays outside the folder."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking"
    )
    for flag in [*flags.split(), f"user-data-dir={folder / 'profile'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    resize(driver, width, height)
    return driver


def resize(browser: Any, width: int, height: int = 900, *, dark: bool = False) -> None:
    """The window's inside in CSS pixels, as a phone has it where it is narrow."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def css(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def wait(browser: Any, condition: str, seconds: float = 120) -> Any:
    """Until a JavaScript expression holds; its value."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, 0.05).until(
        lambda driver: driver.execute_script(f"return {condition}"), condition
    )


def settled(browser: Any) -> None:
    """After a change that is drawn in the next frame."""
    browser.execute_async_script(
        "const done = arguments[0];"
        "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0)))"
    )


def errors(browser: Any) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def focus_order(browser: Any, count: int) -> list[str]:
    """The ids of what Tab reaches, from the page's beginning on."""
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    found = []
    for _ in range(count):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        script = "const e = document.activeElement; return e.id || e.className"
        found.append(browser.execute_script(script))
    return found
