"""The processor's name says what decides a latency, and whether int8 sums overflow."""

from types import SimpleNamespace

import pytest

from efficientformer.runtime import cgroup
from efficientformer.runtime.processor import available_cores, computes_in, hardware, overflows

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


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 3),  # 2.5 cores' time keeps three busy
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "6400000 100000"}, 8),
        ("0::/a.slice/b", {"a.slice/b/cpu.max": "max 100000", "a.slice/cpu.max": "400000 100000"}, 4),
        ("0::/host/only", {"cpu.max": "200000 100000", "other/cpu.max": "100000 100000"}, 2),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("4:cpu,cpuacct:/x\n0::/", {"cpu/x/cpu.cfs_quota_us": "150000", "cpu/x/cpu.cfs_period_us": "50000"}, 3),
        ("4:cpuset:/", {"cpuset/cpu.cfs_quota_us": "50000", "cpuset/cpu.cfs_period_us": "50000"}, 8),
        (None, {"cpu.max": "100000 100000"}, 8),  # not Linux
    ],
)
def test_cores_are_those_of_the_container(tmp_path, monkeypatch, membership, files, cores):
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "root")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    if membership is not None:
        (tmp_path / "membership").write_text(f"{membership}\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(f"{text}\n")
    assert available_cores() == cores


@pytest.mark.parametrize(
    ("flags", "bf16", "fp16"),
    [
        ("flags\t\t: avx2 f16c", False, False),
        ("flags\t\t: avx512f avx512_bf16", True, False),
        ("flags\t\t: amx_tile amx_bf16 avx512_fp16", True, True),
        ("Features\t: fp asimd asimdhp", False, True),
        ("Features\t: fp asimd asimdhp bf16", True, True),
        ("", True, True),  # it does not say
    ],
)
def test_half_precision_is_computed_in_or_emulated(tmp_path, flags, bf16, fp16):
    (tmp_path / "cpuinfo").write_text(flags)
    assert [computes_in(each, tmp_path / "cpuinfo") for each in ("bf16", "fp16")] == [bf16, fp16]
