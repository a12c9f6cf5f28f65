"""A started ComfyUI server: the pack is loaded from custom_nodes, and the demo graph runs through POST /prompt."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

GRAPH = Path(__file__).parent / "demo.api.json"
EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "workflows").glob("*.api.json"))


@pytest.fixture(scope="module")
def server(comfyui, copy_pack, tmp_path_factory):
    """Address and log of a server with the pack under a name of no meaning."""
    base = tmp_path_factory.mktemp("server")
    copy_pack(base / "custom_nodes" / "a-folder")
    (base / "input").mkdir()
    write_picture(base / "input" / "reference.png")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base)]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    log = base / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=comfyui, stdout=stream, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            try:
                get(f"{address}/system_stats")
                break
            except OSError:
                time.sleep(0.5)
        yield address, log
    finally:
        process.terminate()
        process.wait(30)


def write_picture(path):
    from PIL import Image

    pixels = (torch.rand(80, 100, 3, generator=torch.Generator().manual_seed(61)) * 255).byte().numpy()
    Image.fromarray(pixels).save(path)


def get(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


def run(address, graph):
    """Queue a graph; returns its history entry."""
    body = json.dumps({"prompt": graph}).encode()
    request = urllib.request.Request(f"{address}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        prompt = json.load(response)["prompt_id"]
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        history = get(f"{address}/history/{prompt}")
        if prompt in history and history[prompt]["status"]["completed"]:
            return history[prompt]
        if prompt in history and history[prompt]["status"]["status_str"] == "error":
            return history[prompt]
        time.sleep(0.3)
    raise TimeoutError(prompt)


def test_the_nodes_are_there(server):
    address, log = server
    for node in ("LoadIPAdapter", "EncodeImagePrompt", "ApplyIPAdapter", "LoadIPAdapterDemo"):
        info = get(f"{address}/object_info/{node}")[node]
        assert info["category"] == "image prompt"
        assert info["python_module"] == "custom_nodes.a-folder"
    text = log.read_text()
    assert "Error while calling comfy_entrypoint" not in text
    failed = [line for line in text.splitlines() if "IMPORT FAILED" in line and "a-folder" in line]
    assert not failed and "a-folder" in text


def test_the_demo_graph_runs(server):
    address, _ = server
    graph = json.loads(GRAPH.read_text())
    entry = run(address, graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert len(entry["outputs"]["9"]["images"]) == 4
    assert len(entry["outputs"]["3"]["images"]) == 1  # the preview of the crop


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name.removesuffix(".api.json"))
def test_the_example_workflows_run(server, file):
    """Those that need no download, as they are; the others stop at the first file that is not there."""
    address, _ = server
    graph = json.loads(file.read_text())
    if any(node["class_type"] == "CheckpointLoaderSimple" for node in graph.values()):
        with pytest.raises(urllib.error.HTTPError) as refused:
            run(address, graph)
        message = refused.value.read().decode()
        assert "ip-adapter-plus_sd15.safetensors" in message and "v1-5-pruned-emaonly-fp16.safetensors" in message
        return
    entry = run(address, graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    previews = [number for number, node in graph.items() if node["class_type"] == "PreviewImage"]
    assert previews
    for number in previews:
        assert len(entry["outputs"][number]["images"]) == 4


def test_the_second_run_is_cached(server):
    address, _ = server
    graph = json.loads(GRAPH.read_text())
    run(address, graph)
    graph["9"]["inputs"]["filename_prefix"] = "again"
    entry = run(address, graph)
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert {"1", "3", "4", "7"} <= set(cached)


def test_an_error_reaches_the_user(server):
    """A graph from a script may name what no combo offers; some versions refuse it, others ask the node."""
    address, _ = server
    graph = json.loads(GRAPH.read_text())
    graph["3"]["inputs"]["crop"] = "in the middle"
    try:
        message = json.dumps(run(address, graph)["status"])
    except urllib.error.HTTPError as error:
        message = error.read().decode()
    assert "in the middle" in message and "center" in message
