"""The control groups of this process: where Linux says what a container or a service may take of the machine."""

from __future__ import annotations

from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def cgroup_folders(controller: str) -> list[Path]:
    """Return the folders that may limit this process, of either version: its own group's, then those above it.

    Every limit there is holds. A container often sees its own group as the root, under whatever name the membership
    gives: folders that are named and not there say nothing.

    Args:
        controller: What is limited, as version 1 names its folders: ``cpu``, ``memory``.
    """
    try:
        entries = [line.split(":", 2) for line in MEMBERSHIP.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, group in entries:
        if not controllers or controller in controllers.split(","):
            mount = ROOT / controller if controllers else ROOT  # version 2 has one tree, and names no controllers
            own = mount / group.lstrip("/")
            found += [folder for folder in (own, *own.parents) if folder.is_relative_to(mount)]
    return found
