"""Files of weights: what a file is, seen without torch, and the tensors that it holds."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.cli.references import UsageError, nearest
from spectrim.errors import in_short
from spectrim.network.file_kinds import AGAIN, head_of, header_of, is_saved, no_file, not_safetensors, something_else

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_STATE = "save model.state_dict() by itself, with torch.save"
_DENSE = "save the state_dict of a dense, loaded model"
_CHECKPOINT = "give model.safetensors, which compress writes, or weights of the dense model by --weights"


def check_file(weights: str | Path) -> Path:
    """A file of weights that is there, of a kind that can be read, and whole as far as is seen without torch."""
    path = Path(weights)
    if not path.is_file():
        inside = sorted(each for each in path.glob("*.*") if each.suffix in SUFFIXES) if path.is_dir() else []
        close = f": write {inside[0]}" if inside else f".{nearest(path, '*.*')}"
        raise UsageError(f"weights {str(path)!r} is {_what(path)}{close}".removesuffix("."))
    if path.suffix not in SUFFIXES:
        got = repr(path.suffix) if path.suffix else "no suffix"
        raise UsageError(f"weights {str(path)!r}: expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {got}")
    if why := unreadable(path):
        raise UsageError(f"weights {str(path)!r} cannot be read: {why}")
    return path


def check_checkpoint(path: Path) -> None:
    """Refuse a file that :func:`spectrim.load` could not read, as far as is seen without torch."""
    if not path.is_file():
        inside = path / "model.safetensors"
        cure = f": write {inside}" if inside.is_file() else "; compress writes model.safetensors"
        raise UsageError(f"checkpoint {str(path)!r} is {_what(path)}{cure}")
    head = head_of(path)
    why = something_else(head) or not_safetensors(path, head, _CHECKPOINT)
    if not why and "plan" not in (header_of(path).get("__metadata__") or ()):
        why = f"it holds weights and no plan: {_CHECKPOINT}"
    if why:
        raise UsageError(f"checkpoint {str(path)!r} cannot be read: {why}")


def _what(path: Path) -> str:
    kind = no_file(path)
    return f"{kind}, not a file" if kind else "not a file"


def unreadable(path: Path) -> str:
    """Why a file holds no weights, with the cure, as far as its first bytes and its contents show; else nothing."""
    head = head_of(path)
    if path.suffix == ".safetensors":
        return something_else(head) or not_safetensors(path, head, "give it a name that ends in .pt")
    return something_else(head) or _not_saved(path, head)


def _not_saved(path: Path, head: bytes) -> str:
    """Why a file is not as ``torch.save`` writes them."""
    if head[8:9] == b"{" and not not_safetensors(path, head, ""):
        return "it is a safetensors file: give it a name that ends in .safetensors"
    # Another way to save, before torch 1.6, is a pickle; one before that an archive of tar.
    if not is_saved(head) and head[257:262] != b"ustar":
        return "it is not a checkpoint that torch.save wrote, or it is damaged: save or copy it again"
    return _not_zip(path) if head[:2] == b"PK" else ""


def _not_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return f"it is damaged, or a part of it is missing ({str(error)[:80]}): {AGAIN}"
    if any(name.endswith(("/constants.pkl", "/archive_format", "models/model.json")) for name in names):
        return f"it is a program of torch.jit or torch.export: {_STATE}"
    there = any(name.endswith("data.pkl") for name in names)
    return "" if there else "it is an archive that torch.save did not write: give the file that was meant"


def _changed(path: Path) -> str:
    """The part of an archive that is not what was written, by its checksum; torch does not look.

    Archives may be written without checksums: one that no part agrees with says nothing.
    """
    if not zipfile.is_zipfile(path):
        return ""
    good, bad = False, ""
    with zipfile.ZipFile(path) as archive:
        for each in archive.infolist():
            try:
                with archive.open(each) as part:
                    while part.read(1 << 20):
                        pass
                good = good or each.file_size > 0
            except zipfile.BadZipFile:
                bad = bad or each.filename
    return bad if good else ""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a weight file. Pickled code is never run.

    A state dict may lie under ``state_dict``, ``model`` or ``model_state_dict``, or be the only one in the file; the
    prefix ``module.`` that data parallel training leaves on every name is removed.
    """
    import torch

    path = check_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            from spectrim.network.file_kinds import in_utf8

            with in_utf8(path) as readable:
                held: Any = load_file(readable)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
            if part := _changed(path):
                raise ValueError(f"its part {part!r} is not what was written: {AGAIN}")
    except Exception as error:  # each reader has its own errors for a damaged file
        raise UsageError(f"weights {str(path)!r} cannot be read: {_unread(error)}") from error
    state = _state_in(held, path)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): each for name, each in state.items()}
    return state


def part_taken(path: str | Path | None) -> str:
    """Which of several state dicts in a file :func:`read_weights` takes, in words; empty where there is no other."""
    import torch

    if path is None or Path(path).suffix == ".safetensors":
        return ""
    within = _states(torch.load(path, map_location="meta", weights_only=True))
    taken, *others = within or [""]
    beside = ", ".join(map(repr, others))
    return f"its {taken!r}, not {beside}: save another by itself to have it taken" if others else ""


def _state_in(held: Any, path: Path) -> dict[str, Tensor]:
    """The state dict that is what a file holds, or is in it."""
    if _is_state(held):
        return {str(name): each for name, each in held.items()}
    within = _states(held)
    first = next(iter(within), "")
    if first in _WRAPPERS or len(within) == 1:
        return {str(name): each for name, each in within[first].items()}
    there = f"a {type(held).__name__}"
    if isinstance(held, Mapping):
        there = ", ".join(repr(str(key)) for key in list(held)[:6]) if held else "nothing"
    which = f"one of {', '.join(map(repr, within))}" if within else "model.state_dict()"
    raise UsageError(
        f"weights {str(path)!r} hold no mapping of names to tensors, but {there}: save {which} by itself, with "
        "torch.save"
    )


def _states(held: Any) -> dict[str, Mapping[Any, Tensor]]:
    """The state dicts in what a file holds, by their names; what training scripts call a model's comes first."""
    if _is_state(held) or not isinstance(held, Mapping):
        return {}
    within = {str(key): each for key, each in held.items() if _is_state(each)}
    first = [key for key in _WRAPPERS if key in within]
    return {key: within[key] for key in dict.fromkeys([*first, *within])}


def _is_state(held: Any) -> bool:
    from torch import Tensor

    return isinstance(held, Mapping) and bool(held) and all(isinstance(each, Tensor) for each in held.values())


def _unread(error: Exception) -> str:
    """Why a file of weights cannot be read. What torch advises, to run what the file says, is left out."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        return f"it holds a whole model or other objects ({named[1]}), not its weights: save model.state_dict() instead"
    if isinstance(error, pickle.UnpicklingError | EOFError) or "weights_only" in text or "zip archive" in text:
        return "it is not a checkpoint that torch.save wrote, or it is damaged: save or copy it again"
    if AGAIN in text:
        return text
    return f"it is damaged ({in_short(error)}): {AGAIN}"


def fill(model: nn.Module, state: Mapping[str, Tensor], text: str, weights: str | Path) -> None:
    """Put the tensors of a file into a model, under the names that it has (:func:`weight_names.as_named`)."""
    from spectrim.cli.weight_names import as_named

    mine = model.state_dict()
    state = as_named(state, mine)
    if bare := {k: why for k in mine if k in state and (why := _not_plain(state[k]))}:
        k, why = next(iter(bare.items()))
        said = f"weights {str(weights)!r} cannot be put into model {text!r}"
        raise UsageError(f"{said}: {len(bare)} of them {why}, first {k!r}: {_DENSE}")
    if problem := _misfit(state, mine):
        raise UsageError(f"weights {str(weights)!r} do not fit model {text!r}: {problem}")
    try:
        model.load_state_dict(dict(state), strict=False)
    except (RuntimeError, NotImplementedError) as error:  # a model may load in a way of its own
        reason = str(error).strip().rpartition("\n")[2].strip() or in_short(error)
        raise UsageError(f"weights {str(weights)!r} cannot be put into model {text!r}: {reason}") from error


def _misfit(state: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> str:
    """Why tensors do not fit a model's, with the cure; empty where they do."""
    from spectrim.cli.weight_names import missing, prefixes, untied

    lacks = missing(state, mine)
    apart = {"missing": lacks, "unexpected": [k for k in state if k not in mine]}
    both = [k for k in mine if k in state]
    shapes = [(k, tuple(state[k].shape), tuple(mine[k].shape)) for k in both]
    kinds = [(k, state[k].dtype, mine[k].dtype) for k in both]
    unlike = {
        "shape": [each for each in shapes if each[1] != each[2]],
        "type": [each for each in kinds if not _same_kind(*each[1:])],
    }
    problems = [f"{len(ks)} {what} ({', '.join(map(repr, ks[:3]))})" for what, ks in apart.items() if ks]
    for what, found in unlike.items():
        for name, there, here in found[:1]:
            problems.append(f"{len(found)} of another {what} ({name!r} is {there}, the model has {here})")
    if pair := untied(state, mine):
        problems.append(f"{pair[0]!r} and {pair[1]!r} differ in it and are one tensor in the model")
    if not problems:
        return ""
    cure = "give the model that they were saved from, with its arguments as ?name=value"
    if unlike["type"] and len(problems) == 1:
        cure = f"save them as {str(unlike['type'][0][2]).removeprefix('torch.')}"
    whole = prefixes(state, mine) if lacks else []
    cure = _save_alone(whole) if whole else cure
    others = len(lacks) >= len(mine) / 2 and not whole
    return f"{'; '.join(problems)}{'. These look like the weights of another network' if others else ''}: {cure}"


def _save_alone(prefixes: Sequence[str]) -> str:
    those = f"{{k[{len(prefixes[0])}:]: v for k, v in state.items() if k.startswith({prefixes[0]!r})}}"
    return f"all that the model has lies under {' and under '.join(map(repr, prefixes[:3]))}: save that alone, {those}"


def _not_plain(tensor: Tensor) -> str:
    """Why the numbers of a tensor cannot be copied; empty where they can."""
    import torch

    if tensor.is_meta:
        return "have a shape and no numbers (device meta)"
    if tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided:
        return "are sparse, quantised or nested"
    return ""


def _same_kind(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether numbers are cast without losing what they are: floating-point ones among each other, as ``load`` does."""
    return given == wanted or (given.is_floating_point and wanted.is_floating_point)
