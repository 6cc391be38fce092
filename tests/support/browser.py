"""Debian's Chromium without a screen, for tests that look at a web page as a person does."""

import base64
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import ChromeOptions, Remote
from selenium.webdriver.chromium.remote_connection import ChromiumRemoteConnection
from selenium.webdriver.common.proxy import Proxy, ProxyType
from selenium.webdriver.remote.client_config import ClientConfig
from urllib3.exceptions import HTTPError

from tests.support.waiting import wait_until

_START_TIMEOUT = 60.0  # seconds until the driver listens
_PORTS = 5  # attempts to find one
_ANSWER_TIMEOUT = 60.0  # seconds for any command, a page's load included
_STOP_TIMEOUT = 10.0

_QUIET = (
    "--headless=new",
    "--no-sandbox",  # the sandbox does not work as root, which CI is
    "--disable-dev-shm-usage",  # a container's /dev/shm is small
    "--disable-gpu",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def chromium_binaries() -> tuple[str, str] | None:
    """Return the paths of Chromium and of its driver, ``None`` unless both are there."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    return (found[0], found[1]) if found[0] and found[1] else None


class Browser:
    """One window, *width* x *height*; a context manager that ends Chromium and its driver, by their process ids.

    The driver is started here, not by selenium: that would ask the network for one, and wait long for its end.
    """

    def __init__(self, folder: Path, *, width: int = 1280, height: int = 800) -> None:
        self.folder = folder.resolve()
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver: subprocess.Popen[bytes] | None = None
        self._below: list[psutil.Process] = []
        self._web: Remote | None = None

    def __enter__(self) -> Self:
        binaries = chromium_binaries()
        assert binaries is not None, "Chromium is not installed: apt install chromium chromium-driver"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start(*binaries)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        """Ask for the end; after 10 s at most nothing of it runs."""
        self._note()
        if self._web is not None:
            self._web.command_executor.client_config.timeout = _STOP_TIMEOUT
            with suppress(WebDriverException, HTTPError, OSError):
                self._web.quit()
        driver, self._driver, self._web = self._driver, None, None
        if driver is not None:
            driver.terminate()
            with suppress(subprocess.TimeoutExpired):
                driver.wait(_STOP_TIMEOUT)
            driver.kill()
            driver.wait()
        for left in self._below:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        psutil.wait_procs(self._below, _STOP_TIMEOUT)
        self._below.clear()

    # -- what a person does

    def log_in(self, user: str, password: str) -> None:
        """From now on every request, a page's own ones too, carries the password (HTTP basic)."""
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._devtools("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {token}"})

    def open(self, url: str) -> None:
        """Load a page and what it needs."""
        self.web.get(url)

    def status(self, url: str) -> int:
        """The HTTP status with which this browser gets *url*, of the server whose page is open.

        Opening a page that wants a password does not return: Chromium asks for it in a dialog.
        """
        script = "return fetch(arguments[0], {redirect: 'manual', credentials: 'omit'}).then(answer => answer.status)"
        return int(self.ask(script, url))

    def click(self, selector: str) -> None:
        """Click the one element that the CSS selector means."""
        self.web.find_element("css selector", selector).click()

    def text(self, selector: str = "body") -> str:
        """What can be read there; what is hidden is not."""
        return str(self.ask("return document.querySelector(arguments[0])?.innerText.trim() ?? ''", selector))

    def rows(self, selector: str) -> list[list[str]]:
        """The text of all cells of a table's body, row by row, as it can be read; no rows while it is hidden."""
        script = """
            return [...document.querySelectorAll(arguments[0] + ' tbody tr')].filter(row => row.offsetParent)
                .map(row => [...row.cells].map(cell => cell.innerText.trim()))
        """
        return list(self.ask(script, selector))

    def picture(self, file: Path) -> None:
        """Write what the window shows as a PNG, once nothing moves or fades in it any more."""
        still = "return Promise.all(document.getAnimations().map(each => each.finished)).then(() => true, () => true)"
        self.ask(still)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.web.get_screenshot_as_png())

    # -- inside

    @property
    def web(self) -> Remote:
        """Selenium's driver."""
        assert self._web is not None, "not running"
        return self._web

    def ask(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; a promise is waited for."""
        return self.web.execute_script(script, *arguments)

    def _devtools(self, command: str, **parameters: Any) -> None:
        self.web.execute("executeCdpCommand", {"cmd": command, "params": parameters})

    def _start(self, chromium: str, chromedriver: str) -> None:
        port = next(filter(None, (self._start_driver(chromedriver) for _ in range(_PORTS))), None)
        assert port is not None, f"chromedriver found no port that is free in IPv4 and IPv6, {_PORTS} times"
        options = ChromeOptions()
        options.binary_location = chromium
        for argument in (*_QUIET, f"--user-data-dir={self.folder / 'profile'}"):
            options.add_argument(argument)
        direct = Proxy({"proxyType": ProxyType.DIRECT})
        client = ClientConfig(f"http://127.0.0.1:{port}", timeout=int(_ANSWER_TIMEOUT), proxy=direct)
        connection = ChromiumRemoteConnection(client.remote_server_addr, "goog", "chrome", client_config=client)
        self._web = Remote(connection, options=options)
        self._web.set_page_load_timeout(_ANSWER_TIMEOUT / 2)
        self._note()
        # The window's size has a frame in it, this has not.
        self._devtools("Emulation.setDeviceMetricsOverride", **self._size)
        self._devtools("Network.enable")

    def _start_driver(self, chromedriver: str) -> str | None:
        """Start it; return its port. None: the port that it took in IPv6 was taken in IPv4, and it gave up."""
        log_file = self.folder / "chromedriver.log"
        # A home of its own: nothing of a person's profile gets in, nothing is left behind.
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "TMPDIR": str(self.folder), "LANG": "C.UTF-8"}
        with log_file.open("wb") as log:
            self._driver = subprocess.Popen(
                [chromedriver, "--port=0"],
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        def listening() -> Any:
            assert self._driver is not None
            ended = self._driver.poll() is not None
            text = log_file.read_text(errors="replace")
            taken = ended and "port not available" in text
            assert taken or not ended, f"chromedriver ended: {text}"
            return taken or re.search(r"started successfully on port (\d+)", text)

        found = wait_until(listening, "chromedriver listens", _START_TIMEOUT)
        return None if found is True else found[1]

    def _note(self) -> None:
        """Remember the processes below the driver."""
        if self._driver is None:
            return
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self._driver.pid).children(recursive=True)
            self._below += [child for child in found if child not in self._below]
