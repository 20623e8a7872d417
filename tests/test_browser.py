"""A person at work: runs Imagewoof_KD in JupyterLab, loses the kernel in the middle of Experiment 2, and runs all cells again.

Drives a headless Chromium over its DevTools protocol. Screenshots are kept in the folder that KD_SCREENSHOTS names, if it does.
"""

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import websocket_connect

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
NOTEBOOK = "jupyterapp.shell.currentWidget"


class Page:
    """One page of a browser."""

    def __init__(self, socket):
        self.socket, self.numbers = socket, itertools.count(1)

    async def call(self, method, **parameters):
        number = next(self.numbers)
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(await self.socket.read_message())).get("id") != number:
            pass  # events
        return answer["result"]

    async def evaluate(self, expression):
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    async def wait_for(self, expression, seconds=240):
        for _ in range(4 * seconds):
            if await self.evaluate(expression):
                return
            await asyncio.sleep(0.25)
        raise TimeoutError(f"{expression}: not true within {seconds} s")

    async def screenshot(self, folder, name):
        image = (await self.call("Page.captureScreenshot", format="png"))["data"]
        (folder / f"{name}.png").write_bytes(base64.b64decode(image))

    async def run_all_cells(self):
        await self.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")

    async def outputs(self):
        """All text that the cells show."""
        notebook = json.loads(await self.evaluate(f"JSON.stringify({NOTEBOOK}.context.model.toJSON())"))
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output["output_type"] == "error"]
        return "\n".join("".join(output.get("text", output.get("data", {}).get("text/markdown", ""))) for output in outputs)


async def open_page(log, address):
    for _ in range(240):
        if found := re.search(r"listening on ws://([^/]+)/", log.read_text()):
            break
        await asyncio.sleep(0.25)
    target = await AsyncHTTPClient().fetch(f"http://{found[1]}/json/new?{address}", method="PUT", body="")
    return Page(await websocket_connect(json.loads(target.body)["webSocketDebuggerUrl"], max_message_size=1 << 28))


async def lose_the_kernel_and_run_again(log, address, folder, pictures):
    page = await open_page(log, address)
    await page.call("Emulation.setDeviceMetricsOverride", width=1200, height=1400, deviceScaleFactor=1, mobile=False)
    idle = f"{NOTEBOOK}.sessionContext.session?.kernel?.status == 'idle'"
    await page.wait_for(f"window.jupyterapp?.shell?.currentWidget?.content?.widgets?.length > 20 && {idle}")
    await page.evaluate("jupyterapp.commands.execute('notebook:clear-all-outputs') && 0")
    await page.screenshot(pictures, "1-opened")
    await page.run_all_cells()
    end = time.monotonic() + 300
    while not list(folder.glob("runs/*/demo/checkpoints/experiment-2-students-distilled-*.pt")):
        assert time.monotonic() < end, await page.outputs()
        await asyncio.sleep(0.1)
    await page.evaluate("void jupyterapp.commands.execute('notebook:restart-kernel')")
    await page.wait_for("!!document.querySelector('.jp-Dialog .jp-mod-accept')")
    await page.screenshot(pictures, "2-restart")
    first = await page.outputs()
    await page.evaluate("document.querySelector('.jp-Dialog .jp-mod-accept').click()")
    await asyncio.sleep(1)
    await page.wait_for(f"!document.querySelector('.jp-Dialog') && {idle}")
    await page.evaluate("jupyterapp.commands.execute('notebook:clear-all-outputs') && 0")
    await page.run_all_cells()
    last_cell = f"{NOTEBOOK}.content.widgets.filter(cell => cell.model.type == 'code').at(-1).model"
    await page.wait_for(f"{last_cell}.executionCount != null && {last_cell}.outputs.length > 0")
    await page.screenshot(pictures, "3-report")
    for number, heading in enumerate(("Distillation", "Report"), 4):
        index = f"{NOTEBOOK}.content.widgets.findIndex(cell => cell.model.sharedModel.source.match(/^#+ {heading}\\n/))"
        await page.evaluate(f"{NOTEBOOK}.content.scrollToItem({index}, 'start')")
        await asyncio.sleep(2)
        await page.screenshot(pictures, f"{number}-{heading.lower()}")
    return first, await page.outputs()


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_lost_kernel_costs_nothing(tmp_path):
    folder, pictures = tmp_path / "work", Path(os.environ.get("KD_SCREENSHOTS", tmp_path))
    folder.mkdir()
    for name in ("Imagewoof_KD.ipynb", "kd_utils.py"):
        shutil.copy(ROOT / name, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--IdentityProvider.token=t", "--expose-app-in-browser", "--no-browser", "--allow-root"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KD_")} | {"KD_PROFILE": "demo"}
    log = tmp_path / "browser.log"
    with log.open("w") as errors, (tmp_path / "server.log").open("w") as server_log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=folder, env=environment, stdout=server_log, stderr=server_log)
        flags = [*FLAGS, "--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'profile'}"]
        browser = subprocess.Popen([BROWSER, *flags], stdout=errors, stderr=errors)
        try:
            while "is running at" not in (tmp_path / "server.log").read_text():
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.25)
            address = f"http://127.0.0.1:{port}/lab/tree/Imagewoof_KD.ipynb?token=t"
            first, second = asyncio.run(lose_the_kernel_and_run_again(log, address, folder, pictures))
        finally:
            browser.terminate(), server.terminate()
            browser.wait(30), server.wait(30)
    assert "not run yet" not in second and "students distilled: " not in first
    assert "Experiment 1, students alone was finished before and is loaded" in second
    assert "Experiment 2, teacher was finished before and is loaded" in second
    assert re.search(r"Experiment 2, students distilled (continues after step \d+ of 27|was finished before)", second)
    assert second.count("Distillation changed its accuracy by") == 2
