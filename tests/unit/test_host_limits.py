"""What the kernel's files say about memory and CPUs, in the forms that devices have."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.host import cgroup, cpus, identity, memory

V2 = "26 1 0:24 / {mount} rw,nosuid - cgroup2 cgroup2 rw\n"
V1_MEMORY = "32 31 0:29 / {mount} rw - cgroup cgroup rw,memory\n"
V1_CPU = "33 31 0:30 / {mount} rw - cgroup cgroup rw,cpu,cpuacct\n"


class Kernel:
    """The files of one imaginary kernel below a folder."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.groups = folder / "cgroup"
        self.cpus = folder / "cpu"

    def write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group(self, path: str, **files: str) -> None:
        for name, text in files.items():
            self.write(self.groups / path / name.replace("__", "."), text)

    def belongs_to(self, cgroup_lines: str, mountinfo: str) -> None:
        self.write(self.proc / "cgroup", cgroup_lines)
        self.write(self.proc / "mountinfo", mountinfo.format(mount=self.groups))

    def cpu(self, number: int, *, core: int, capacity: int = 0) -> None:
        folder = self.cpus / f"cpu{number}"
        self.write(folder / "topology" / "core_id", f"{core}\n")
        self.write(folder / "topology" / "physical_package_id", "0\n")
        if capacity:
            self.write(folder / "cpu_capacity", f"{capacity}\n")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_the_tightest_group_of_version_2_counts_and_droppable_pages_are_free(kernel: Kernel) -> None:
    kernel.belongs_to("0::/system.slice/agent.service\n", V2)
    kernel.group(
        "system.slice/agent.service",
        memory__max="1000000",
        memory__high="max",
        memory__current="700000",
        memory__stat="anon 1\ninactive_file 50000\n",
    )
    kernel.group("system.slice", memory__max="max", memory__current="900000")
    assert cgroup.memory_left_bytes(kernel.proc) == 350_000


def test_a_parent_group_limits_its_children(kernel: Kernel) -> None:
    kernel.belongs_to("0::/system.slice/agent.service\n", V2)
    kernel.group("system.slice/agent.service", memory__max="max", memory__current="10")
    kernel.group("system.slice", memory__max="5000", memory__current="4000")
    assert cgroup.memory_left_bytes(kernel.proc) == 1000


def test_version_1_counts_and_its_number_for_no_limit_does_not(kernel: Kernel) -> None:
    kernel.belongs_to("4:memory:/box/agent\n0::/\n", V1_MEMORY)
    kernel.group(
        "box/agent",
        memory__limit_in_bytes="2000000",
        memory__usage_in_bytes="500000",
        memory__stat="inactive_file 1\ntotal_inactive_file 100000\n",
    )
    kernel.group("box", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1")
    assert cgroup.memory_left_bytes(kernel.proc) == 1_600_000


def test_a_group_of_the_host_that_a_container_does_not_see_is_the_mounted_one(kernel: Kernel) -> None:
    kernel.belongs_to("0::/docker/abc\n", V2)
    kernel.group("", memory__max="3000", memory__current="1000")
    assert cgroup.memory_left_bytes(kernel.proc) == 2000


def test_no_control_groups_limit_nothing(kernel: Kernel) -> None:
    assert cgroup.memory_left_bytes(kernel.proc) is None
    assert cgroup.cpu_quota(kernel.proc) is None


def test_cpu_time_is_limited_by_either_version(kernel: Kernel) -> None:
    kernel.belongs_to("0::/a\n", V2)
    kernel.group("a", cpu__max="150000 100000")
    assert cgroup.cpu_quota(kernel.proc) == 1.5
    kernel.belongs_to("2:cpu,cpuacct:/b\n", V1_CPU)
    kernel.group("b", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert cgroup.cpu_quota(kernel.proc) == 3.0
    kernel.group("b", cpu__cfs_quota_us="-1")
    assert cgroup.cpu_quota(kernel.proc) is None


def test_this_host_has_memory_and_this_process_takes_some() -> None:
    assert memory.available_bytes() > 1 << 20
    own = int(Path("/proc/self/stat").read_text().split()[0])
    assert 1 << 20 < memory.resident_bytes(own) <= memory.peak_bytes(own)
    assert memory.resident_bytes(1 << 30) == 0


def test_two_cpus_of_one_core_are_one_and_two_candidates(kernel: Kernel) -> None:
    for cpu in range(8):
        kernel.cpu(cpu, core=cpu // 2)
    assert cpus.thread_counts(cpus=kernel.cpus, allowed=set(range(8)), quota=8) == (4, 8)
    assert cpus.thread_counts(cpus=kernel.cpus, allowed={0, 1}, quota=8) == (1, 2)


def test_the_fast_cores_of_a_mixed_cpu_are_a_candidate(kernel: Kernel) -> None:
    for cpu in range(8):
        kernel.cpu(cpu, core=cpu, capacity=1024 if cpu >= 6 else 500)
    assert cpus.thread_counts(cpus=kernel.cpus, allowed=set(range(8)), quota=8) == (8, 2, 4)


def test_the_quota_caps_every_candidate_and_half_is_always_one(kernel: Kernel) -> None:
    for cpu in range(4):
        kernel.cpu(cpu, core=cpu)
    assert cpus.thread_counts(cpus=kernel.cpus, allowed=set(range(4)), quota=4) == (4, 2)
    assert cpus.thread_counts(cpus=kernel.cpus, allowed=set(range(4)), quota=1.5) == (2, 1)
    assert cpus.thread_counts(cpus=kernel.cpus, allowed=set(range(4)), quota=0.5) == (1,)


def test_cpus_that_the_kernel_does_not_describe_are_cores(kernel: Kernel) -> None:
    assert cpus.thread_counts(cpus=kernel.cpus, allowed={0, 1, 2}, quota=3) == (3, 1)


def test_the_host_is_named_by_its_cpu_and_library(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU\n")
    named = identity.of_host(cpuinfo)
    assert "Some CPU" in named
    assert "onnxruntime-genai 0.18" in named
    assert named == identity.of_host(cpuinfo)
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd08\n")
    assert identity.of_host(cpuinfo) != named
