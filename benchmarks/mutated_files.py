"""Files of every kind with something changed in them: refused with an error of the library, or what was written (N3).

Half of the changes are those of disks and transfers (bytes set, flipped, cut out, doubled, replaced), half go to where
it hurts: values of the records and plans, tensors of other numbers, types, shapes and names. Files of earlier versions
have no digests; such are a row of their own, and what loads of them must be what they say.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import spectrim as st
from benchmarks.run import claim
from spectrim.cost.latency import Latency
from spectrim.errors import SpectrimError
from spectrim.network.tensor_files import TENSORS, TEXTS
from spectrim.nn.checkpoint import load as load_checkpoint
from spectrim.nn.checkpoint import read_plan
from spectrim.selection.plan import LARGEST
from spectrim.selection.trajectory import Trajectory
from spectrim.train import Loop, Recipe, Schedule

WORDS = (b"null", b"1e999", b"-1", b"[]", b"{}", b'"', b"9" * 20, b"\\u0000", b"true", b"dense", b"0", b"NaN")
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**6, 2**62, 10**400, 0.5, -0.5, math.nan, math.inf, "", "dense", "1", [], {}, [1, 2],
    {"a": 1}, "[" * 5000, list(range(2000)),
)  # fmt: skip
SECONDS, BYTES = 10.0, 2**30


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    data: bytes  # a whole one
    read: Callable[[Path], Any]  # reads the file at a path as a user would, and says what it read, to be compared
    tensors: bool  # whether it is a safetensors file; else it is JSON
    # What a changed file says by itself, for files that are meant to be edited or have no digests: what is read must
    # agree. None if what is read must be what was written.
    stated: Callable[[bytes, Any], bool] | None = None


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """All kinds, each in a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, kind in kinds(Path(folder)).items():
                count = config["files"][name]
                rows.append({"kind": name, **in_child(lambda k=kind, c=count: mutate(k, c, config["seed"]))})
                print(rows[-1], flush=True)
    finally:
        torch.set_num_threads(threads)
    total, other, silent = (sum(row[key] for row in rows) for key in ("files", "other", "silent"))
    slowest, largest = max(row["seconds"] for row in rows), max(row["bytes"] for row in rows)
    met = not other and not silent and slowest <= SECONDS and largest <= BYTES
    note = (
        f"{total} files: {sum(row['refused'] for row in rows)} refused, {sum(row['read'] for row in rows)} read as "
        f"they were written or as they say, {silent} else; slowest {slowest:.2f} s, {largest / 2**20:.0f} MiB at most"
    )
    target, unit = "0 other errors, 0 silent changes, <= 10 s and <= 1 GiB each", f"of {total} files wrong or unclear"
    return {
        "claims": {"N3": claim(other + silent, unit, target, met, note)},
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": [
            "Bytes are what the process of all files of a row took at most beside what it took before, so no file of "
            "the row took more.",
            "Plans and trajectories are texts that people edit: what is read must be what the text says, and a plan "
            "that names other choices is carried out. So it is with files without digests, of versions up to 0.1.",
        ],
    }  # fmt: skip


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns in a child process, whose memory is its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            with open(writing, "w", encoding="utf-8") as out:
                out.write(json.dumps(work()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8") as answer:
        text = answer.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the process of a kind of file died")
    return json.loads(text)


def mutate(kind: Kind, count: int, seed: int) -> dict[str, Any]:
    """Read so many changed files, and count what came."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter(refused=0, read=0, other=0, silent=0)
    errors: Counter[str] = Counter()
    slowest, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(kind.data)
        whole = kind.read(path)
        for data in changed(kind, count, draw):
            path.write_bytes(data)
            begin = time.perf_counter()
            try:
                found = kind.read(path)
            except (SpectrimError, OSError) as error:
                counts["refused"] += 1
                errors[type(error).__name__] += 1
            except Exception as error:
                counts["other"] += 1
                errors[f"{type(error).__name__}: {str(error)[:80]}"] += 1
            else:
                right = same(found, whole) if kind.stated is None else kind.stated(data, found)
                counts["read" if right else "silent"] += 1
            slowest = max(slowest, time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"files": count, **counts, "seconds": slowest, "bytes": 1024 * (peak - before), "errors": dict(errors)}


# --- changes --------------------------------------------------------------------------------------------------------


def changed(kind: Kind, count: int, draw: random.Random) -> Iterator[bytes]:
    """Changed files, each another one than the whole."""
    made = 0
    while made < count:
        how = draw.randrange(4)
        if how < 2:
            # Headers and the ends of files are small beside tensors, and where most can go wrong.
            data = edited(kind.data, draw, len(kind.data) if how else min(len(kind.data), 4096))
        elif kind.tensors:
            data = with_other_values(kind.data, draw)
        else:
            text = json.loads(kind.data)
            revalued(text, draw)
            data = json.dumps(text).encode()
        if data != kind.data:
            made += 1
            yield data


def edited(data: bytes, draw: random.Random, end: int) -> bytes:
    """One to four edits before ``end``: bytes set, bits flipped, pieces cut out, doubled or replaced, words put in."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at, size = draw.randrange(max(1, min(end, len(out)))), draw.choice((1, 1, 2, 8, 40))
        kind = draw.randrange(7)
        if kind == 0:
            out[at : at + 1] = draw.randbytes(1)
        elif kind == 1 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at : at + size] = draw.randbytes(size)
        elif kind == 5:
            out[at : at + size] = draw.choice(WORDS)
        else:
            del out[at:]
    return bytes(out)


def with_other_values(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file that is whole, with another tensor, another name, or another value in its texts."""
    tensors, texts = load(data), texts_of(data)
    name = draw.choice(sorted(tensors))
    how = draw.randrange(8)
    if how < 4:
        key = draw.choice([key for key, text in texts.items() if text[:1] in "{["] or sorted(texts))
        try:
            value = json.loads(texts[key])
        except ValueError:
            value = [texts[key]]
        revalued(value, draw)
        texts[key] = json.dumps(value)
    elif how == 4:
        del tensors[name]
    elif how == 5:
        tensors[draw.choice((*sorted(tensors), "more", "model/more"))] = tensors[name].clone()
    else:
        tensors[name] = other(tensors[name], draw)
    return save(tensors, texts)


def other(tensor: Tensor, draw: random.Random) -> Tensor:
    """Other numbers, another type or another shape."""
    flat = tensor.clone().reshape(-1)
    changes: list[Callable[[], Tensor]] = [
        lambda: tensor.double() if tensor.dtype != torch.float64 else tensor.float(),
        lambda: tensor.half() if tensor.is_floating_point() else tensor.float(),
        lambda: tensor.to(torch.int64),
        lambda: flat,
        lambda: flat[:-1].clone(),
        lambda: torch.cat([flat, flat]),
        lambda: torch.full_like(tensor, math.nan if tensor.is_floating_point() else 1),
        lambda: torch.zeros_like(tensor),
        lambda: (flat * 2).reshape(tensor.shape),
    ]
    return draw.choice(changes)()


def revalued(document: Any, draw: random.Random) -> None:
    """Change one value somewhere in a document: another one, removed, or a name changed."""
    while True:
        keys: list[Any] = list(document) if isinstance(document, dict) else list(range(len(document)))
        if not keys:
            document.append(1) if isinstance(document, list) else document.update(a=1)
            return
        key = draw.choice(keys)
        if isinstance(document[key], (dict, list)) and draw.random() < 0.8:
            document = document[key]
            continue
        how = draw.randrange(8)
        if how == 0:
            del document[key]
        elif how == 1 and isinstance(document, dict):
            document[f"{key}_"] = document.pop(key)
        else:
            document[key] = draw.choice(VALUES)
        return


def texts_of(data: bytes) -> dict[str, str]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


def without_digests(data: bytes) -> bytes:
    """A file as versions up to 0.1 wrote it."""
    return save(load(data), {key: text for key, text in texts_of(data).items() if key not in (TENSORS, TEXTS)})


def same(first: Any, second: Any) -> bool:
    """Equality of nested values, tensors bit for bit, NaN equal to itself."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and save({"": first}) == save({"": second})
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second or (first != first and second != second))


# --- kinds ----------------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 12, generator=generator)
    return list(zip(inputs.split(16), torch.arange(64).remainder(4).split(16), strict=True))


def kinds(folder: Path) -> dict[str, Kind]:
    """Whole files of every kind, written by the library."""
    dense, data = network(), batches()
    low = st.compress(dense, data, st.Budget(macs=0.5))
    sparse = st.compress(dense, data, st.Budget(parameters=0.6), methods=[st.LowRankPlusSparse()])
    st.save(low.model, low.plan, folder / "low")
    st.save(sparse.model, sparse.plan, folder / "sparse")
    recipe = Recipe(epochs=2, checkpoint_every=1, keep="best")
    tuned = _tuned(folder / "tuned", recipe)
    tuned.run()
    schedule, learning = Schedule(steps=3), Recipe(epochs=2)

    def learn(place: Path) -> Any:
        return st.learn_ranks(
            network(), data, st.Budget(macs=0.5), learning=learning, tuning=Recipe(epochs=0), schedule=schedule,
            checkpoint=place, progress=False,
        )  # fmt: skip

    learned = learn(folder / "learned")
    learned.trajectory.write(folder / "ranks.json")

    def again(path: Path) -> Any:
        place = path.parent / "run"
        place.mkdir(exist_ok=True)
        (place / "learning.safetensors").write_bytes(path.read_bytes())
        (place / "plan.json").unlink(missing_ok=True)
        found = learn(place)
        return found.model.state_dict(), found.plan.to_json(), found.trajectory.to_json()

    def model(path: Path) -> Any:
        return load_checkpoint(network(1), path).state_dict(), read_plan(path).to_json()

    def tuning(path: Path) -> Any:
        loop = _tuned(path, recipe)
        return loop.model.state_dict(), loop.run().history, loop.result().steps, loop._optimizer.state_dict()["state"]

    low.plan.write(folder / "plan.json")
    clock = _clock(folder / "cache")
    clock.prepare([[site.spec] for site in low.sites])
    cache = next((folder / "cache").iterdir())

    def times(path: Path) -> Any:
        target = path.parent / "cache" / cache.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = dict(_clock(target.parent)._times)
        if seen:
            # Said, and measured anew.
            raise SpectrimError(str(seen[0].message))
        return found

    def plan(path: Path) -> Any:
        found = st.Plan.read(path)
        if [entry.choice for entry in found] != [entry.choice for entry in low.plan]:
            st.apply(dense, low.sites, found)
        return found.to_json()

    files = {name: (folder / name).read_bytes() for name in ("low", "sparse", "tuned", "plan.json", "ranks.json")}
    learnt = (folder / "learned" / "learning.safetensors").read_bytes()
    return {
        "models": Kind(files["low"], model, tensors=True),
        "sparse models": Kind(files["sparse"], model, tensors=True),
        "fine-tunings": Kind(files["tuned"], tuning, tensors=True),
        "learned ranks": Kind(learnt, again, tensors=True),
        "models without digests": Kind(without_digests(files["low"]), model, True, _model_says),
        "sparse models without digests": Kind(without_digests(files["sparse"]), model, True, lambda data, found: True),
        "fine-tunings without digests": Kind(without_digests(files["tuned"]), tuning, True, _tuning_says),
        "learned ranks without digests": Kind(without_digests(learnt), again, True, lambda data, found: True),
        "plans": Kind(files["plan.json"], plan, False, _text_says),
        "trajectories": Kind(
            files["ranks.json"], lambda path: Trajectory.read(path).to_json(), False, _text_says
        ),
        "measured times": Kind(cache.read_bytes(), times, tensors=False),
        "large plans": Kind(_large(low.plan), plan, False, _text_says),
    }  # fmt: skip


def _tuned(path: Path, recipe: Recipe) -> Loop:
    def score(model: nn.Module) -> float:
        return float(next(model.parameters()).sum())

    return Loop(network(2), batches(), recipe, teacher=network(), evaluate=score, checkpoint=path, progress=False)


def _clock(cache: Path) -> Latency:
    def timer(chains: Any, **options: Any) -> list[float]:
        return [0.1 + 0.01 * number for number in range(len(chains))]

    return Latency(cache=cache, threads=1, timer=timer)


def _large(plan: st.Plan) -> bytes:
    """A plan at the limit of what is read."""
    text = plan.to_json()
    return text[:1].encode() + b" " * (LARGEST - len(text)) + text[1:].encode()


def _text_says(data: bytes, found: str) -> bool:
    """Whether every value of a text is read as it stands there."""

    def within(stated: Any, held: Any) -> bool:
        if isinstance(stated, dict) and isinstance(held, dict):
            return all(key in held and within(value, held[key]) for key, value in stated.items())
        if isinstance(stated, list) and isinstance(held, list):
            return len(stated) == len(held) and all(map(within, stated, held))
        return stated == held and isinstance(stated, bool) == isinstance(held, bool)

    return within(json.loads(data), json.loads(found))


def _model_says(data: bytes, found: tuple[dict[str, Tensor], str]) -> bool:
    """Whether tensors and plan are those of a file without digests; floating-point ones may be of another type."""
    state, plan = found
    tensors, texts = load(data), texts_of(data)
    stored = {**tensors, **{name: tensors[source] for name, source in json.loads(texts["shared"]).items()}}
    return _text_says(texts["plan"].encode(), plan) and state.keys() == stored.keys() and all(
        torch.equal(tensor, stored[name].to(tensor.dtype)) or bool(stored[name].isnan().any())
        for name, tensor in state.items()
    )  # fmt: skip


def _tuning_says(data: bytes, found: tuple[Any, ...]) -> bool:
    """Whether a run that is done ends in the weights of its file, which holds the best ones."""
    best = {name[5:]: tensor for name, tensor in load(data).items() if name.startswith("best/")}
    return same(dict(found[0]), best)
