"""What a result was measured on: hardware, commit, and no name of a person, a host or a folder."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

from bench.environments import ROOT


def hardware() -> dict[str, object]:
    """The processor, its vector units, cores, memory in GiB, and the operating system's kind."""
    facts: dict[str, object] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    described = Path("/proc/cpuinfo")
    if described.exists():
        text = described.read_text(encoding="utf-8")
        if name := re.search(r"^model name\s*: (.+)$", text, re.MULTILINE):
            facts["cpu"] = name[1].strip()
        flags = re.search(r"^flags\s*: (.+)$", text, re.MULTILINE)
        known = set(flags[1].split()) if flags else set()
        facts["vectors"] = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in known]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return facts


def commit() -> str:
    """The checkout's commit, with a plus behind it where the tree had changes."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def without_places(text: str, *folders: Path) -> str:
    """The text with the folders of this machine replaced: a result must not tell where it was made."""
    for folder in sorted({*folders, ROOT, ROOT.parent, Path.home()}, key=lambda path: -len(str(path))):
        if len(folder.parts) > 1:
            text = text.replace(str(folder), "...")
    return text


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
