"""Rows of a long benchmark, kept one by one, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import code_version


def rows(
    path: Path, keys: Iterable[Mapping[str, Any]], row: Callable[..., dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """``row(**key)`` of every key, in order, and a note on the commits they were measured at if these are several.

    Rows that the file holds are not measured again, those of changed code neither: who wants all of them of one commit
    removes the file, as a run to its end does.
    """
    stands = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    commit = code_version()["commit"]
    found: list[dict[str, Any]] = []
    commits: dict[str, int] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for key in keys:
        line = next((each for each in stands if each["key"] == dict(key)), None)
        if line is None:
            line = {"key": dict(key), "commit": commit, "row": {**key, **row(**key)}}
            print(line["row"], flush=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        found.append(line["row"])
        commits[line["commit"]] = commits.get(line["commit"], 0) + 1
    path.unlink(missing_ok=True)
    parts = ", ".join(f"{count} at {commit[:12]}" for commit, count in commits.items())
    return found, [f"Rows of several commits: {parts}."] if len(commits) > 1 else []
