"""The processor's name says what decides a latency, and whether int8 sums overflow."""

from types import SimpleNamespace

import pytest

from efficientformer.runtime.processor import available_cores, hardware, overflows

CORES = f", {available_cores()} cores"


@pytest.mark.parametrize(
    ("text", "name", "overflow"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu sse4_2 avx2 fma\n", "AMD EPYC with AVX2", True),
        (
            "model name\t: AMD EPYC\nflags\t\t: avx2 avx512f avx512_bf16 avx512_vnni\nbugs\t: spectre\n",
            "AMD EPYC with AVX2, AVX-512, VNNI, bf16",
            False,
        ),
        ("model name\t: N100\nflags\t\t: fpu avx2 avx_vnni\n", "N100 with AVX2, VNNI", False),
        ("model name\t: Old\nflags\t\t: fpu sse2\nflags\t\t: avx2\n", "Old", True),
        (
            "CPU implementer\t: 0x41\nCPU part\t: 0xd40\nFeatures\t: fp asimddp sve\n",
            "Arm 0x41 0xd40 with dot products, SVE",
            False,
        ),
        ("model name\t: Neoverse\nFeatures\t: fp asimd asimddp bf16\n", "Neoverse with dot products, bf16", False),
    ],
)
def test_processors_of_one_name_are_told_apart(tmp_path, text, name, overflow):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{text}")
    assert hardware(tmp_path / "cpuinfo") == name + CORES
    assert overflows(tmp_path / "cpuinfo") is overflow


def test_macs_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("subprocess.run", lambda command, **_: SimpleNamespace(stdout=f"Apple M3, by {command[0]}\n"))
    assert hardware(tmp_path / "none") == f"Apple M3, by /usr/sbin/sysctl{CORES}"


def test_where_linux_says_nothing(tmp_path):
    assert hardware(tmp_path / "none").endswith(CORES)
    assert not overflows(tmp_path / "none")
