"""Which layers may share factors: repeated modules, and layers that see one input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from spectrim.errors import called_as
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer, Sites, Skipped

_RULES = ("inputs", "repeated")


@called_as("Write group(sites), with the sites of find or calibrate", sites=Sites)
def group(
    sites: Sites,
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    rules: Sequence[str] = _RULES,
    nested: bool = True,
) -> Sites:
    """Offer groups of sites that may share factors, beside the sites themselves.

    ``sites.groups`` lists them by name. Edit the listing and give it back as ``groups`` to choose by hand. Whether a
    group is worth it, whole or in parts, is decided with everything else when a plan is selected.

    Parameters
    ----------
    sites
        From :func:`spectrim.find` or :func:`spectrim.calibrate`; calibration keeps the groups.
    groups
        Names of sites by the name of the group. Found by the rules if None; ``{}`` for none.
    rules
        What to look for, in order of preference; a site belongs to what the first of them finds for it.

        ``"inputs"``: linear layers of one module that are called with one tensor, as the queries, keys and values of
        attention, or gate and up projection. Known after calibration.

        ``"repeated"``: layers at the same place of repeated modules: names that differ in one number
        (``layer2.0.conv2``, ``layer2.1.conv2``), with equal kernels, channels and output shape. Layers of another input
        depth, as the first of a stage has, join a larger group that can share the second factor only (RJSVD-1 of the
        paper). Strides may differ.
    nested
        Offer the halves of a repeated group too, and their halves, so that a long group can be split.

    Returns
    -------
    Sites
        The same with ``groups``.

    Raises
    ------
    ValueError
        If a group given by hand names a site that there is not, names one twice, has less than two, or overlaps another
        one without containing it.
    """
    if groups is not None:
        found = {name: tuple(members) for name, members in groups.items()}
    else:
        unknown = [rule for rule in rules if rule not in _RULES]
        if unknown or isinstance(rules, str):
            raise ValueError(f"rules is {rules!r}; expected some of {', '.join(map(repr, _RULES))}")
        found = {}
        for rule in rules:
            taken = {site for members in found.values() for site in members}
            free = [site for site in sites if site.name not in taken and not site.spec.looks_up]
            found |= _same_inputs(sites, free) if rule == "inputs" else _repeated(free, nested=nested)
    check(sites, found)
    return dataclasses.replace(sites, groups=MappingProxyType(found))


def check(sites: Sites, groups: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError for groups that a plan could not be made of."""
    names = {site.name for site in sites}
    for name, members in groups.items():
        for member in members:
            if member not in names:
                raise ValueError(f"group {name!r} names {member!r}, which is no site; see sites.sites")
        if len(members) < 2 or len(set(members)) < len(members):
            raise ValueError(f"group {name!r} has sites {list(members)}; expected two or more, each once")
        if name in names:
            raise ValueError(f"group {name!r} has the name of a site; give it another one")
    listed = list(groups.items())
    for number, (name, members) in enumerate(listed):
        for other, theirs in listed[:number]:
            mine, them = set(members), set(theirs)
            if mine & them and (mine == them or not (mine < them or them < mine)):
                raise ValueError(
                    f"groups {other!r} and {name!r} overlap; of two groups one contains more sites and all of the "
                    "other's, or they have none in common"
                )


def residual(sites: Sites) -> Sites:
    """Keep what the paper of joint decomposition keeps: the stem, the first stage, shortcuts and the classifier.

    Of a residual network with repeated blocks in stages, the sites left are the layers of repeated blocks after the
    first stage; every other one is left alone and counted (Chen et al. 2021, section IV).

    Raises
    ------
    ValueError
        If the names show fewer than two stages.
    """
    positions: dict[str, list[Layer]] = {}
    for site in sites:
        patterns = [pattern for pattern, _ in _patterns(site.name)]
        if patterns:
            positions.setdefault(patterns[-1], []).append(site)
    repeated = {pattern: found for pattern, found in positions.items() if len(found) > 1}
    stages = list(dict.fromkeys(pattern.partition("*")[0] for pattern in repeated))
    if len(stages) < 2:
        raise ValueError(
            f"the names of these {len(sites)} sites show {len(stages)} stage(s) of repeated blocks; the preset needs "
            "two or more, as 'layer1.0.conv1', 'layer1.1.conv1', 'layer2.0.conv1', ... have"
        )
    kept = {s.name for pattern, found in repeated.items() if not pattern.startswith(stages[0]) for s in found}
    left = [site.spec for site in sites if site.name not in kept]
    return dataclasses.replace(
        sites,
        sites=tuple(site for site in sites if site.name in kept),
        skipped=(*sites.skipped, *(Skipped(s.name, s.kind, "kept dense by the preset") for s in left)),
        untouched=(*sites.untouched, *left),
    )


def _same_inputs(sites: Sites, free: Iterable[Layer]) -> dict[str, tuple[str, ...]]:
    """Linear layers of one parent that see one tensor and have the same inputs."""
    known = {site.name: site.spec for site in free}
    found: dict[str, tuple[str, ...]] = {}
    for names in sites.same_inputs:
        families: dict[tuple[object, ...], list[str]] = {}
        for name in names:
            if name in known and known[name].is_linear:
                spec = known[name]
                families.setdefault((name.rpartition(".")[0], spec.dtype, spec.device), []).append(name)
        for (parent, *_), members in families.items():
            if len(members) > 1:
                leaves = "+".join(name.rpartition(".")[2] for name in members)
                found[f"{parent}.{leaves}" if parent else leaves] = tuple(members)
    return found


def _repeated(free: Sequence[Layer], *, nested: bool) -> dict[str, tuple[str, ...]]:
    """Groups of layers at the same place of repeated modules, with the halves of each."""
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    depth = max((len(_patterns(site.name)) for site in free), default=0)
    for level in range(depth):
        positions: dict[str, list[tuple[int, Layer]]] = {}
        for site in free:
            patterns = _patterns(site.name)
            if site.name not in taken and level < len(patterns):
                pattern, number = patterns[level]
                positions.setdefault(pattern, []).append((number, site))
        for pattern, members in positions.items():
            # Names tell the stage where something follows the number; in a flat sequence the output shape does.
            flat = pattern.endswith("*")
            for core in _alike(members, flat=flat):
                wide = _wider(core, members, flat=flat)
                for some in ([wide] if wide else []) + ([core] if len(core) > 1 else []):
                    _add(found, pattern, some, nested=nested and some is core)
                    taken.update(site.name for _, site in some)
    return found


def _patterns(name: str) -> list[tuple[str, int]]:
    """The name with one of its numbers replaced by ``*``, and that number, from the outermost number inwards."""
    parts = name.split(".")
    return [
        (".".join([*parts[:n], "*", *parts[n + 1 :]]), int(part)) for n, part in enumerate(parts) if part.isdecimal()
    ]


def _kin(spec: LayerSpec, *, flat: bool) -> tuple[object, ...]:
    """What layers that share a second factor have in common, with the stage of a flat sequence by its output shape."""
    seen = tuple(spec.output_shape(shape) for shape in spec.inputs) if flat else ()
    return (*spec.family, spec.out_channels, seen)


def _alike(members: Sequence[tuple[int, Layer]], *, flat: bool) -> list[list[tuple[int, Layer]]]:
    """Members that agree in all that matters; a single one only where others join it by the second factor."""
    classes: dict[tuple[object, ...], list[tuple[int, Layer]]] = {}
    for number, site in members:
        classes.setdefault((*_kin(site.spec, flat=flat), site.spec.in_channels), []).append((number, site))
    found = [some for some in classes.values() if len(some) > 1]
    covered = {_kin(some[0][1].spec, flat=flat) for some in found}
    for some in classes.values():
        kin = _kin(some[0][1].spec, flat=flat)
        if kin not in covered:
            covered.add(kin)
            found.append(max((other for key, other in classes.items() if key[:-1] == kin), key=len))
    return found


def _wider(
    core: Sequence[tuple[int, Layer]], members: Sequence[tuple[int, Layer]], *, flat: bool
) -> list[tuple[int, Layer]]:
    """The core with layers of another input depth, if there are any; each goes to one core only."""
    kin = _kin(core[0][1].spec, flat=flat)
    classes: dict[int, list[tuple[int, Layer]]] = {}
    for number, site in members:
        if _kin(site.spec, flat=flat) == kin:
            classes.setdefault(site.spec.in_channels, []).append((number, site))
    # Two cores of one kin would both claim the rest, and such groups would overlap: then neither gets it.
    largest = max(classes.values(), key=len)
    rivals = [some for some in classes.values() if len(some) > 1 and some is not largest]
    if core[0][1].spec.in_channels != largest[0][1].spec.in_channels or rivals:
        return []
    wide = sorted((pair for some in classes.values() for pair in some), key=lambda pair: pair[0])
    return wide if len(wide) > len(core) else []


def _add(
    found: dict[str, tuple[str, ...]], pattern: str, members: Sequence[tuple[int, Layer]], *, nested: bool
) -> None:
    ordered = sorted(members, key=lambda pair: pair[0])
    numbers = [number for number, _ in ordered]
    first, last = numbers[0], numbers[-1]
    contiguous = numbers == list(range(first, last + 1))
    name = pattern.replace("*", f"[{first}-{last}]" if contiguous else f"[{','.join(map(str, numbers))}]")
    found[name] = tuple(site.name for _, site in ordered)
    if nested and len(ordered) > 2:
        half = (len(ordered) + 1) // 2
        for some in (ordered[:half], ordered[half:]):
            if len(some) > 1:
                _add(found, pattern, some, nested=True)
