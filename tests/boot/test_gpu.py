"""GPUs: memory and the report, from what the vendors' tools print, and from tools that fail."""

import stat
import sys
from pathlib import Path

import pytest

from boot import gpu


def tools(nvidia: str, rocm: str) -> gpu.RunTool:
    return lambda argv: {"nvidia-smi": nvidia, "rocm-smi": rocm}[argv[0]]


@pytest.mark.parametrize(
    ("nvidia", "rocm", "total_bytes"),
    [
        ("", "", None),
        ("81000\n 40000\n", "", 121000 << 20),
        ("[N/A]\n5\n", "", 5 << 20),
        ("No devices were found\n", "", None),
        (
            "",
            '{"card0": {"VRAM Total Memory (B)": "100"}, "card1": {"VRAM Total Memory (B)": "30"}, "system": {}}',
            130,
        ),
        ("", '{"system": {}}', None),
        ("", '{"card0": {"VRAM Total Memory (B)": "x"}}', None),
        ("", "[1]", None),
    ],
)
def test_memory_is_summed_over_the_cards(nvidia: str, rocm: str, total_bytes: int | None) -> None:
    assert gpu.total_vram_bytes(tools(nvidia, rocm)) == total_bytes


def test_a_tool_that_is_missing_or_fails_has_no_output(tmp_path: Path) -> None:
    assert gpu.run_tool([str(tmp_path / "none")]) == ""
    assert gpu.run_tool([sys.executable, "-c", "print('lost'); raise SystemExit(1)"]) == ""
    assert gpu.run_tool([sys.executable, "-c", "import os; os.write(1, b'\\xff ok')"]) == "� ok"


@pytest.mark.parametrize(
    ("tool", "output", "line"),
    [
        ("nvidia-smi", "NVIDIA A100, 80 GiB\nNVIDIA T4, 16 GiB\n", "GPU: NVIDIA A100, 80 GiB; NVIDIA T4, 16 GiB"),
        ("nvidia-smi", "", "GPU: nvidia-smi is installed but reports none"),
        ("rocm-smi", "device,name\ncard0,MI300\n", "GPU: card0,MI300"),
        ("rocm-smi", "", "GPU: rocm-smi is installed but reports none"),
        ("", "", "GPU: none found (neither nvidia-smi nor rocm-smi), llama-server runs on the CPU"),
    ],
)
def test_the_report_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, output: str, line: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if tool:
        (tmp_path / tool).touch(stat.S_IRWXU)
    assert gpu.report(tools(nvidia=output, rocm=output)) == line
    assert gpu.has_tool() == bool(tool)


def test_a_model_larger_than_the_memory_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    gpu.warn_if_short(3_150_000, 3_150_000)
    gpu.warn_if_short(3_150_000, None)
    assert caplog.messages == []
    gpu.warn_if_short(3_150_000, 1 << 20)
    assert caplog.messages == [
        "the model has 3.15 MB, the GPU 1.05 MB: llama-server may fail or be slow; lower NGL or CTX"
    ]


def test_models_that_are_larger_together_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    gpu.warn_if_short(3_150_000, 1 << 20, max_loaded=2)
    assert caplog.messages == [
        "the largest 2 models (MODELS_MAX) have 3.15 MB, the GPU 1.05 MB: llama-server may fail or be slow;"
        " lower MODELS_MAX, NGL or CTX"
    ]
