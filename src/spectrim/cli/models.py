"""Model references -> modules, and weight files -> their state.

==========================  =============================================================================
reference                   model
==========================  =============================================================================
``package.module:factory``  whatever the callable returns; options become its keyword arguments
``./file.py:factory``       the same, of a Python file
``timm:NAME``               ``timm.create_model(NAME, **options)``; pretrained unless ``?pretrained=false``
``torchvision:NAME``        ``torchvision.models.get_model(NAME, **options)``; ``weights=DEFAULT`` by default
``hf:NAME``                 the architecture named in the hub model's (or local folder's) configuration
==========================  =============================================================================

With a weight file the built-in schemes do not fetch pretrained weights. :func:`check_reference` reads a reference, and
looks for what it names, without torch.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from spectrim.cli.common import is_of_memory
from spectrim.cli.references import Reference, UsageError, call_reference, factory, installed, nearest, need, parse
from spectrim.cli.sources import check_factory, names_nothing
from spectrim.cli.weights import SUFFIXES, check_file, fill, part_taken, read_weights, unreadable
from spectrim.errors import SpectrimError, did_you_mean, in_short, with_article

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Scheme:
    """A built-in kind of model."""

    make: Callable[[Reference, bool], Any]  # the model of a name, with pretrained weights or without
    check: Callable[[Reference], None]  # refuses a name that it cannot have, as far as is seen without torch
    fetches: str  # the option that leaves pretrained weights out; empty for none
    # Lines of code: what is imported, and what makes the network without its weights.
    imported: str
    made: str


def check_reference(text: str) -> None:
    """Refuse a reference that :func:`load_model` could not load, as far as is seen without torch."""
    reference = parse(text)
    if reference.scheme in SCHEMES:
        SCHEMES[reference.scheme].check(reference)
    else:
        if close := _close_scheme(reference):
            raise UsageError(f"model {text!r} is not known.{close}")
        _check_named(reference)
        check_factory(reference, "model")


def _check_named(reference: Reference) -> None:
    """Refuse the bare name of a model, which does not say whose it is."""
    name = reference.scheme
    if not reference.place and Path(name).is_dir():
        raise UsageError(
            f"model {reference.text!r} is a folder: write file.py:function, which returns the model, or hf:{name} for "
            "one that transformers saved there"
        )
    there = Path(name).exists() or Path(f"{name}.py").is_file()
    if reference.place or there or name.endswith(".py") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return
    libraries = ("hf",) if "/" in name else tuple(SCHEMES)
    raise UsageError(
        f"model {reference.text!r} is not known: for a model of a library write "
        f"{' or '.join(f'{library}:{name}' for library in libraries)}, for your own file.py:function"
    )


def _close_scheme(reference: Reference) -> str:
    """A question where a built-in name was meant: the reference names no module, but nearly a built-in name."""
    scheme, path = reference.scheme, Path(reference.text)
    if not reference.place and path.suffix in SUFFIXES and path.is_file():
        return (
            f" It is a file of weights: write file.py:function, which returns the model, and --weights {reference.text}"
        )
    return did_you_mean(scheme, SCHEMES) if names_nothing(scheme) else ""


def load_model(text: str, weights: str | Path | None = None, *, pretrained: bool = True) -> nn.Module:
    """The model that a reference names, in evaluation mode.

    Parameters
    ----------
    weights
        ``.safetensors``, or a ``.pt`` / ``.pth`` / ``.bin`` file that ``torch.load(weights_only=True)`` reads. Of a
        compressed model, as compress writes it, the result is that model, which may be compressed again.
    pretrained
        Whether the built-in schemes fetch pretrained weights where no file is given.

    Raises
    ------
    CheckpointError
        If it is the file of a compressed model that is damaged or of another architecture.
    """
    from torch import nn

    reference = parse(text)
    pretrained = pretrained and weights is None
    if reference.scheme in SCHEMES:
        model = SCHEMES[reference.scheme].make(reference, pretrained)
    else:
        made = factory(reference, "model")
        if isinstance(made, nn.Module):
            raise UsageError(
                f"model {text!r}: {reference.place} is a {type(made).__name__} itself: write a function that returns it"
            )
        model = call_reference(made, reference, "model")
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {text!r} returned {with_article(type(model).__name__)}, not a torch.nn.Module")
    if weights is not None and _is_compressed(check_file(weights)):
        from spectrim.nn.checkpoint import load

        model = load(model, weights)
    elif weights is not None:
        fill(model, read_weights(weights), text, weights)
    return model.eval()


def load_compressed(text: str, checkpoint: str | Path) -> nn.Module:
    """A compressed model from the reference of its dense architecture and a checkpoint, in evaluation mode.

    Raises CheckpointError if the file is missing, damaged or belongs to another architecture.
    """
    from spectrim.nn.checkpoint import load

    return load(load_model(text, pretrained=False), checkpoint).eval()


def _is_compressed(path: Path) -> bool:
    """Whether a file is one that compress wrote."""
    from safetensors import SafetensorError, safe_open

    from spectrim.network.file_kinds import in_utf8
    from spectrim.nn.checkpoint import FORMAT

    if path.suffix != ".safetensors":
        return False
    try:
        with in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False  # read_weights says why


def whose_weights(text: str, weights: str | Path | None = None) -> str:
    """Whose weights a model has, in words."""
    if weights is not None:
        part = part_taken(weights)
        return f"the weights of {weights}{part and f' ({part})'}"
    reference = parse(text)
    if reference.scheme not in SCHEMES:
        return f"the weights that {text} returns"
    fetched = reference.options.get(SCHEMES[reference.scheme].fetches, True)
    return f"the {'pretrained' if fetched else 'random'} weights of {reference.scheme}:{reference.place}"


def _place(reference: Reference) -> str:
    if not reference.place:
        raise UsageError(f"model {reference.text!r} names no model: write {reference.scheme}:NAME")
    return reference.place


def _registered(reference: Reference) -> None:
    """Refuse a name that no model in an installed package has, by what its files register."""
    package = reference.scheme
    name, root = _place(reference), installed(package, reference, package)
    if root is None or ":" in name or "/" in name:  # of a hub, or a folder
        return
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(root.joinpath("models").rglob("*.py")))
    found = re.findall(r"^@register_model(?:\(\s*(?:name\s*=\s*\"(\w+)\")?\s*\))?.*?^def (\w+)\(", text, re.M | re.S)
    names = [named or function for named, function in found]
    base = name.partition(".")[0]
    if names and base.lower() not in map(str.lower, names) and not re.search(rf"\b{re.escape(base)}\b", text):
        raise UsageError(
            f"model {reference.text!r}: {package} has no model {base!r}; it has {len(names)}, listed by "
            f"{package}.{'models.' if package == 'torchvision' else ''}list_models().{did_you_mean(base, names)}"
        )


def _check_hub(reference: Reference) -> None:
    """Refuse a folder without a configuration, and what can be no name on a hub."""
    name = _place(reference)
    installed("transformers", reference, "transformers")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"model {reference.text!r}: it has no config.json; give what save_pretrained wrote")
        for file in sorted(folder.glob("model*.safetensors")):
            if why := unreadable(file):
                raise UsageError(f"model {reference.text!r}: {file.name!r} cannot be read: {why}")
    elif name.startswith((".", "/", "~")):
        close = nearest(folder, "*/")
        raise UsageError(f"model {reference.text!r}: there is no such folder.{close}".removesuffix("."))
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"model {reference.text!r}: {name!r} is no name on a hub: write hf:NAME or hf:OWNER/NAME")
    elif os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE") and name not in _stored():
        raise UsageError(
            f"model {reference.text!r}: HF_HUB_OFFLINE is set, and {name!r} was not fetched before."
            f"{did_you_mean(name, _stored())}"
        )
    elif name not in _stored():
        _check_connection(reference, name)


def _check_connection(reference: Reference, name: str) -> None:
    """Refuse what must be fetched where the hub cannot be reached, which transformers tries for half a minute."""
    if why := _out_of_reach(seconds=5):
        raise UsageError(
            f"model {reference.text!r}: {why}, and {name!r} was not fetched before: write hf:FOLDER, which "
            f"save_pretrained wrote, or fetch it where there is a connection.{did_you_mean(name, _stored())}"
        )


def _out_of_reach(seconds: float) -> str:
    """Why the hub cannot be reached, if so; a proxy is taken to reach it."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443)
    if getproxies():
        return ""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return f"{host} cannot be reached ({error.strerror or error})"
    return ""


def hub_folder() -> Path:
    """Where models and data are that were fetched from the hub."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", base / "huggingface")) / "hub")


def _stored() -> list[str]:
    """Names of models that were fetched from the hub before."""
    folders = hub_folder().glob("models--*")
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]


def _timm(reference: Reference, pretrained: bool) -> nn.Module:
    return _made(reference, "timm", "create_model", {"pretrained": pretrained})


def _torchvision(reference: Reference, pretrained: bool) -> nn.Module:
    return _made(reference, "torchvision.models", "get_model", {"weights": "DEFAULT" if pretrained else None})


def _made(reference: Reference, module: str, function: str, usual: Mapping[str, Any]) -> nn.Module:
    """What a function of a library makes of a name and options."""
    name = _place(reference)
    make = getattr(need(module, reference, reference.scheme), function)
    try:
        return make(name, **{**usual, **reference.options})
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UsageError(f"model {reference.text!r}: {reference.scheme} cannot make it: {error}") from error


def _transformers(reference: Reference, pretrained: bool) -> nn.Module:
    name = _place(reference)
    transformers = need("transformers", reference, "transformers")
    _check_hub(reference)
    # Folders of models that were compressed before.
    need("spectrim.hf", reference, "transformers")
    try:
        # What was fetched before is there at once: without a connection transformers would try again and again.
        held: dict[str, Any] = {"local_files_only": True} if name in _stored() and _out_of_reach(seconds=1) else {}
        config = transformers.AutoConfig.from_pretrained(name, **{**held, **reference.options})
        kind = _class_of(config, transformers, reference)
        if not pretrained:
            return kind(config)
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loaded = kind.from_pretrained(name, config=config, **told, **held)
    except SpectrimError:
        raise
    except Exception as error:  # of files and configurations that are damaged, each reader has its own
        if is_of_memory(error):
            raise
        kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
        reason, close = f"{kind}{in_short(error)}", did_you_mean(name, {*_stored()} - {name})
        raise UsageError(f"model {reference.text!r}: transformers cannot load it: {reason}{close}") from error
    if random := [key for keys in ("missing_keys", "mismatched_keys") for key in loaded[keys]]:
        first = random[0] if isinstance(random[0], str) else random[0][0]
        raise UsageError(
            f"model {reference.text!r}: {len(random)} of its weights would be random, first {first!r}: they are not in "
            "its files, or of another shape there. Copy it again with the config.json that it was saved with, or write "
            "a factory and pass file.py:factory"
        )
    return model


def _class_of(config: Any, transformers: Any, reference: Reference) -> Any:
    """The class of transformers that a configuration names."""
    names = config.architectures or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if kind is None:
        raise UsageError(
            f"model {reference.text!r}: its configuration names {names}, of which transformers "
            f"{transformers.__version__} has no class; write a factory and pass package.module:factory"
        )
    wanted = getattr(kind, "config_class", None)
    if wanted is None or not isinstance(config, wanted):
        raise UsageError(
            f"model {reference.text!r}: its configuration is of model_type {config.model_type!r} and names {names[0]}, "
            "which is no model of that type: give the config.json that save_pretrained wrote"
        )
    return kind


SCHEMES: Mapping[str, Scheme] = {
    "timm": Scheme(
        _timm, _registered, "pretrained", "import timm",
        "timm.create_model({place!r}, pretrained=False{options})",
    ),
    "torchvision": Scheme(
        _torchvision, _registered, "weights", "import torchvision",
        "torchvision.models.get_model({place!r}, weights=None{options})",
    ),
    "hf": Scheme(
        _transformers, _check_hub, "", "from transformers import AutoConfig, {kind}",
        "{kind}(AutoConfig.from_pretrained({place!r}{options}))",
    ),
}  # fmt: skip
"""By what stands before the colon."""
