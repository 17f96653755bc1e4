"""Situations of strangers' networks by every method: compressed and right, or refused with layer, reason and cure (N1).

What is right is not asked of the library's own proof. A network that comes back is run here: replaced layers are
counted by hooks and operations by torch's own counter, the dense architecture with the weights that layers answer has
to compute the same, and so have the file, the merged network, a copy, a state dict and an exported program; a budget of
all that is there gives the dense outputs, and a larger budget no larger error.

A refusal is clear if the library raises it, and its text names a place (a layer, a class, an argument), a reason and
what to do; :func:`unclear` says what of that it looks for.
"""

from __future__ import annotations

import copy
import importlib
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import spectrim as st
from benchmarks import resumed
from benchmarks.run import claim
from benchmarks.situation_table import COMPRESSED, REFUSED, SITUATIONS, Situation
from spectrim.nn.copying import copy_model
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.nesting import output_tensors

for _table in ("held", "passed", "layers", "states", "borrowed"):
    importlib.import_module(f"benchmarks.situations_{_table}")

ARMS: dict[str, tuple[str, list[st.Method] | None]] = {
    "default": ("macs", None),
    "filters": ("macs", [st.PrincipalFilters()]),
    "joint": ("parameters", None),
    "sparse": ("bytes", [st.LowRankPlusSparse()]),
}

_PLACES = frozenset(
    ("model", "network", "batch", "batches", "calibration", "samples", "forward", "budget", "skip", "layer", "layers")
)
_REASON = re.compile(r"[:;,]| since | because | so that | which | cannot | has no | is no | expected | was | would ")
_CURE = re.compile(
    r"\b(skip|only|forward|samples|mask|methods|groups|rows|masks)=|\bexpected\b|\b(?:pass|give|call|use|set|run|load|"
    r"cast|move|see|ask|compress|convert|remove|raise|lower|take|register|put|unwrap|make|build|replace|drop|try|start|"
    r"keep|turn|choose|widen|allow|add|leave|check|mend)\b",
    re.IGNORECASE,
)


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every situation by every arm."""
    names = config.get("situations") or list(SITUATIONS)
    keys = [{"situation": name, "arm": arm} for name in names for arm in config["arms"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        rows, mixed = resumed.rows(
            paths["work"] / "situations.jsonl",
            keys,
            lambda situation, arm: row(SITUATIONS[situation], arm, paths["work"]),
        )
    finally:
        torch.set_num_threads(threads)
    count = Counter(row["outcome"] for row in rows)
    bad = count["wrong"] + count["unclear"]
    note = f"{len(names)} situations, {', '.join(config['arms'])}: " + ", ".join(
        f"{count[kind]} {kind}" for kind in ("right", "refused", "wrong", "unclear")
    )
    target = "60 situations, all methods: 0 wrong, 0 unclear; every refusal names layer, reason, cure"
    return {
        "claims": {"N1": claim(bad, "wrong or unclear", target, not bad and len(names) >= 60, note)},
        "rows": rows,
        "what_is_right": [
            {"situation": each.name, "kind": each.kind, "right": each.right, "default": each.outcome}
            for each in map(SITUATIONS.__getitem__, names)
        ],
        "seeds": [config["seed"]],
        "notes": [
            "checks: how many of the independent checks were made and held. Those that are not asked (no export of the "
            "dense network, operations that torch's counter does not know, random outputs) are left out of the count.",
            f"{sum('InfeasibleBudgetError' in row.get('reason', '') for row in rows)} refusals are budgets that the "
            "method cannot meet.",
            *mixed,
        ],
    }


def row(case: Situation, arm: str, work: Path) -> dict[str, Any]:
    """What one method makes of one situation, and what is wrong with it."""
    start = time.perf_counter()
    with torch.random.fork_rng(), case.around(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = _row(case, arm, work)
    return {"kind": case.kind, **found, "seconds": round(time.perf_counter() - start, 2)}


def _row(case: Situation, arm: str, work: Path) -> dict[str, Any]:
    dense = case.build()
    before = _state(dense)
    switches = _switches()
    try:
        result = shrunk(case, dense, arm, case.budget)
    except Exception as error:
        missing = unclear(error, dense)
        faults = _changed(before, switches, dense)
        if case.outcome == COMPRESSED and arm == "default":
            faults.append("refused, and can be compressed")
        outcome = "wrong" if faults else "unclear" if missing else "refused"
        reason = f"{type(error).__name__}: {error}"
        return {"outcome": outcome, "reason": reason[:600], "missing": ", ".join(missing), "faults": "; ".join(faults)}
    faults = _changed(before, switches, dense)
    faults += ["compressed, and cannot be"] if case.outcome == REFUSED and arm == "default" else []
    held = []
    for name, check in checks(case, arm, work / "situations").items():
        try:
            fault = check(dense, result)
        except _NotAsked:
            continue
        except Exception as error:
            if unclear(error, dense):
                fault = f"{type(error).__name__}: {str(error)[:300]}"
            else:
                held.append(f"{name} refused")
                continue
        if fault is None:
            held.append(name)
        else:
            faults.append(f"{name}: {fault}")
    differs = None if result.report.agreement is None else result.report.agreement.error
    outcome = "wrong" if faults else "right"
    told = {"ratio": result.plan.ratio(ARMS[arm][0]), "differs": differs, "checks": len(held)}
    refused = [each for each in held if each.endswith("refused")]
    return {"outcome": outcome, **told, "refused_later": ", ".join(refused), "faults": "; ".join(faults)}


def shrunk(case: Situation, dense: nn.Module, arm: str, share: float) -> st.Result:
    cost, methods = ARMS[arm]
    return st.compress(dense, case.data(), st.Budget(**{cost: share}), methods=methods, **case.options)


def unclear(error: Exception, dense: Any) -> list[str]:
    """What a refusal lacks: to be the library's own, a place, a reason, what to do."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    ours = frame is not None and Path(st.__file__).parent in Path(frame.tb_frame.f_code.co_filename).parents
    text = str(error)
    names = [name for name, _ in dense.named_modules() if name] if isinstance(dense, nn.Module) else []
    kinds = {type(m).__name__ for m in dense.modules()} if isinstance(dense, nn.Module) else {type(dense).__name__}
    words = set(re.findall(r"[\w.]+", text))
    place = bool(words & {*names, *kinds, *_PLACES})
    asked = {
        "the library's own error": ours and isinstance(error, (st.SpectrimError, TypeError, ValueError)),
        "a place": place,
        "a reason": len(text) >= 40 and bool(_REASON.search(text)),
        "a cure": bool(_CURE.search(text)),
    }
    return [name for name, there in asked.items() if not there]


# --- what must not change -------------------------------------------------------------------------------------------


def _state(dense: Any) -> dict[str, Any]:
    if not isinstance(dense, nn.Module) or any(p.is_meta for p in dense.parameters()) or _lazy(dense):
        return {}
    state = {name: value.clone() for name, value in dense.state_dict().items() if isinstance(value, Tensor)}
    told = {name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in dense.named_modules()}
    return {"tensors": state, "modules": told, "trained": [p.requires_grad for p in dense.parameters()]}


def _lazy(model: nn.Module) -> bool:
    return any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters())


def _switches() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled,  # type: ignore[attr-defined]
    )  # fmt: skip


def _changed(before: dict[str, Any], switches: tuple[Any, ...], dense: Any) -> list[str]:
    faults = [] if _switches() == switches else ["a switch of torch was changed"]
    if before:
        after = _state(dense)
        same = all(
            torch.equal(t, after["tensors"][name]) or bool(t.isnan().any()) for name, t in before["tensors"].items()
        )
        faults += [] if same else ["the dense network was changed"]
        faults += [
            f"{part} of the dense network changed" for part in ("modules", "trained") if before[part] != after[part]
        ]
    return faults


# --- checks of a network that came back -----------------------------------------------------------------------------

Check = Callable[[nn.Module, st.Result], str | None]


class _NotAsked(Exception):
    """A check that says nothing here."""


def checks(case: Situation, arm: str, work: Path) -> dict[str, Check]:
    """By the name; each gives None, or what is wrong."""
    batch = next(iter(case.data()))
    feed = Feed(case.options.get("forward"), case.options.get("samples"))
    cost, _ = ARMS[arm]

    @torch.no_grad()
    def outputs(model: nn.Module) -> list[Tensor]:
        # A copy, since a pass may leave something on the model.
        return [each.clone() for each in output_tensors(feed(_copied(model).eval(), batch))]

    def apart(wanted: list[Tensor], given: list[Tensor]) -> str | None:
        return _apart(wanted, given, case.rounding)

    def exact(check: Check) -> Check:
        def asked(dense: nn.Module, result: st.Result) -> str | None:
            if not case.exact:
                raise _NotAsked
            return check(dense, result)

        return asked

    def runs(dense: nn.Module, result: st.Result) -> str | None:
        wanted, given = outputs(dense), outputs(result.model)
        if [t.shape for t in wanted] != [t.shape for t in given]:
            return None if case.varies else f"shapes are {[tuple(t.shape) for t in given]}"
        broken = any(
            bool(a.isfinite().all()) and not bool(b.isfinite().all()) for a, b in zip(wanted, given, strict=True)
        )
        return "outputs are no numbers" if broken else None

    def calls(dense: nn.Module, result: st.Result) -> str | None:
        names = [
            layer
            for entry in result.plan
            if not entry.of_channels and not entry.choice.is_dense
            for layer in entry.sites
        ]
        one, two = (_calls(model, names, feed, batch) for model in (dense, result.model))
        if case.varies:
            return None if set(two) <= set(one) else f"{two} calls in place of {one}"
        return None if one == two else f"{dict(two)} calls in place of {dict(one)}"

    def work_done(dense: nn.Module, result: st.Result) -> str | None:
        if not case.counted:
            raise _NotAsked
        size = feed.layout.size(batch)
        told = [result.plan.dense_costs["macs"], result.plan.costs["macs"]]
        real = [_macs(model, feed, batch) / size for model in (dense, result.model)]
        pairs = list(zip(told, real, strict=True))[: 1 if arm == "sparse" else 2]
        wrong = [
            f"{planned:,.0f} MACs are counted, torch counts {done:,.0f}"
            for planned, done in pairs
            if abs(planned - done) > 0.01 * done
        ]
        return "; ".join(wrong) or None

    def parameters(dense: nn.Module, result: st.Result) -> str | None:
        if arm == "sparse":
            raise _NotAsked
        stored, told = (sum(p.numel() for p in result.model.parameters()), result.plan.costs["parameters"])
        return None if stored == told else f"{stored:,} parameters where the plan says {told:,.0f}"

    def reference(dense: nn.Module, result: st.Result) -> str | None:
        if any(entry.of_channels for entry in result.plan):
            raise _NotAsked
        return apart(outputs(_with_weights(dense, result)), outputs(result.model))

    def saved(dense: nn.Module, result: st.Result) -> str | None:
        work.mkdir(parents=True, exist_ok=True)
        path = work / f"{case.name}-{arm}.safetensors"
        st.save(result.model, result.plan, path)
        size = path.stat().st_size
        fresh = (case.architecture or case.build)()
        loaded = st.load(fresh, path)
        path.unlink()
        if cost == "bytes" and size > result.plan.costs["bytes"]:
            return f"the file has {size:,} bytes where the plan says {result.plan.costs['bytes']:,.0f}"
        return _unequal(outputs(result.model), outputs(loaded)) if case.exact else None

    def merged(dense: nn.Module, result: st.Result) -> str | None:
        return apart(outputs(result.model), outputs(st.merge(result.model)))

    def copied(dense: nn.Module, result: st.Result) -> str | None:
        return _unequal(outputs(result.model), outputs(copy.deepcopy(result.model)))

    def state_dict(dense: nn.Module, result: st.Result) -> str | None:
        twin = _copied(result.model)
        state = {key: t.clone() if isinstance(t, Tensor) else t for key, t in result.model.state_dict().items()}
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        twin.load_state_dict(state)
        return _unequal(outputs(result.model), outputs(twin))

    def exported(dense: nn.Module, result: st.Result) -> str | None:
        if arm not in ("default", "filters") or not case.exact or "forward" in case.options:
            raise _NotAsked
        args, kwargs = feed.arguments(dense, batch)
        try:
            _export(_copied(dense), args, kwargs).module()(*args, **kwargs)
        except Exception:
            raise _NotAsked from None
        program = _export(_copied(result.model), args, kwargs)
        with torch.no_grad():
            args, kwargs = feed.arguments(dense, batch)
            return apart(outputs(result.model), list(output_tensors(program.module()(*args, **kwargs))))

    def whole_budget(dense: nn.Module, result: st.Result) -> str | None:
        if cost == "bytes":
            # A file with a plan has to save what the plan takes.
            raise _NotAsked
        try:
            whole = shrunk(case, dense, arm, 1.0)
        except st.InfeasibleBudgetError:
            raise _NotAsked from None
        return apart(outputs(dense), outputs(whole.model))

    def larger_budget(dense: nn.Module, result: st.Result) -> str | None:
        if arm != "default":
            raise _NotAsked
        larger = shrunk(case, dense, arm, (1 + case.budget) / 2)
        errors = [_error(outputs(dense), outputs(each.model)) for each in (larger, result)]
        return (
            None
            if errors[0] <= 1.1 * errors[1] + 1e-3
            else f"{errors[0]:.2%} of error with more, {errors[1]:.2%} with less"
        )

    found = {
        "runs": runs, "calls": calls, "work": work_done, "parameters": parameters, "reference": exact(reference),
        "saved": saved, "merged": exact(merged), "copied": exact(copied), "state dict": exact(state_dict),
        "exported": exported, "whole budget": exact(whole_budget), "larger budget": exact(larger_budget),
    }  # fmt: skip
    return {**found, **({"own": case.fault} if case.fault else {})}


def _copied(model: nn.Module) -> nn.Module:
    """A copy to run; the model itself where it cannot be copied, which it then has to bear.

    Of Python's alone, functions would call the layers of the model.
    """
    try:
        return copy_model(model)
    except Exception:
        return model


def _calls(model: nn.Module, names: list[str], feed: Feed, batch: Any) -> Counter[str]:
    seen: Counter[str] = Counter()
    twin = _copied(model).eval()
    for name in names:
        twin.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.update((name,)))
    with torch.no_grad():
        feed(twin, batch)
    return seen


def _macs(model: nn.Module, feed: Feed, batch: Any) -> float:
    twin = _copied(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        feed(twin, batch)
    return counter.get_total_flops() / 2


@torch.no_grad()
def _with_weights(dense: nn.Module, result: st.Result) -> nn.Module:
    """The dense architecture with the weights that layers answer now: no code of the library computes in it.

    Layers that keep their weights are fitted too, to what compressed ones before them deliver.
    """
    twin, done = _copied(dense), set()
    for name in (layer for entry in result.plan for layer in entry.sites):
        layer, small = twin.get_submodule(name), result.model.get_submodule(name)
        if id(layer) not in done:
            done.add(id(layer))
            layer.weight.copy_(torch.as_tensor(small.weight.detach().clone()))  # type: ignore[union-attr, operator]
            bias = getattr(small, "bias", None)
            layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # type: ignore[union-attr, operator]
    return twin


def _export(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return torch.export.export(model.eval(), args, kwargs or None, strict=False)


def _error(wanted: list[Tensor], given: list[Tensor]) -> float:
    if [t.shape for t in wanted] != [t.shape for t in given]:
        raise _NotAsked
    gaps = [
        ((a.double() - b.double()).norm(), a.double().norm())
        for a, b in zip(wanted, given, strict=True)
        if a.is_floating_point()
    ]
    return max((float(gap / size.clamp_min(1e-30)) for gap, size in gaps), default=0.0)


def _apart(wanted: list[Tensor], given: list[Tensor], rounding: float) -> str | None:
    if [t.shape for t in wanted] != [t.shape for t in given]:
        return "outputs have other shapes"
    error = _error(wanted, given)
    return None if error <= rounding else f"outputs differ by {error:.2%}"


def _unequal(wanted: list[Tensor], given: list[Tensor]) -> str | None:
    same = len(wanted) == len(given) and all(torch.equal(a, b) for a, b in zip(wanted, given, strict=True))
    return None if same else "outputs are not the same bits"
