"""Files of networks with sparse weights: as large as counted, and read back bit for bit or refused."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spectrim as st
from spectrim.cost.counted import size_bytes
from spectrim.errors import CheckpointError
from spectrim.linalg.packing import packed_bytes
from spectrim.linalg.patterns import pattern
from spectrim.linalg.unfold import unfolding
from spectrim.methods import LowRankPlusSparse
from spectrim.network.choices import Choice
from spectrim.network.layer import LayerSpec
from spectrim.nn.build import skeleton
from spectrim.nn.checkpoint import load, read_plan, same_weights, save
from spectrim.nn.find import find
from spectrim.nn.sparse.layers import Masked, Slim, Summed, laid_out
from spectrim.nn.surgery import merge, replace_module, size_in_bytes
from tests.cases import batches_for, one_thread, settled
from tests.nn.layers import LAYERS, Wrapped, close
from tests.nn.nets import low_rank, plan_of

KIND = "low_rank_plus_sparse"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def choice(rank: int, density: float, name: str = "unstructured", how: str = "channel", **more: object) -> Choice:
    settings = {"unfolding": how, "rank": rank, "density": density, "pattern": name, **more}
    return Choice(KIND, "some-method", settings)  # type: ignore[arg-type]


def specs_of(made: Choice, spec: LayerSpec) -> list[LayerSpec]:
    """The layers that a method would name for a choice."""
    kind, rank = pattern(made["pattern"]), made["rank"]
    pair = list(spec.factor(unfolding(spec.kernel, made["unfolding"]), rank)) if rank else []
    stored = kind.kept(spec.shape, made["density"])
    return [*pair, *([spec.sparse(kind, made["density"], bias=spec.bias and not rank)] if stored else [])]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and random masks of the same numbers of units."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, Masked):
            shape = module.original.shape
            density = float(module.mask.double().mean())
            module.mask.copy_(laid_out(module.pattern.keep(torch.rand(shape), density), module.original))
            module.settle()
        elif isinstance(module, Slim):
            g, _, i, *_ = module.original.shape
            kept = module.channels.numel() // g
            rows = [torch.randperm(i)[:kept].sort().values + i * group for group in range(g)]
            module.channels.copy_(torch.cat(rows))
    return model


def compressed(model: nn.Module, choices: Mapping[str, Choice]) -> nn.Module:
    sites = find(model)
    for name, made in choices.items():
        (module,) = skeleton(made, [sites[name].spec])
        replace_module(model, sites[name].spec.names, module)
    return randomised(model)


def header_of(path: Any) -> tuple[dict[str, Any], int]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), len(data) - 8 - length


CASES = {
    "unstructured": ("conv2d", choice(0, 0.07)),
    "unstructured-dense-code": ("linear", choice(0, 0.5)),
    "plus-pair": ("conv2d", choice(2, 0.1, how="height-first")),
    "rows": ("linear", choice(1, 0.3, "rows")),
    "rows-grouped": ("conv2d-grouped", choice(1, 0.2, "rows")),
    "2:4": ("conv2d-1x1", choice(1, 0.5, "2:4")),
    "4:8": ("conv3d-grouped", choice(0, 0.5, "4:8")),
    "blocks": ("conv2d", choice(1, 0.25, "3x2")),
    "channels": ("conv2d", choice(2, 0.5, "channels")),
    "channels-grouped": ("conv2d-grouped", choice(0, 0.5, "channels")),
    "taps": ("conv2d", choice(1, 0.1, "taps-1x3@1x0")),
    "transposed": ("transposed2d-grouped", choice(1, 0.2)),
    "transposed-blocks": ("transposed2d", choice(0, 0.3, "2x2")),
    "everything": ("conv1d", choice(0, 1.0)),
    "one-entry": ("linear-tokens", choice(2, 0.03)),
}


@pytest.mark.table
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_file_is_as_large_as_counted_and_comes_back_bit_for_bit(case, dtype, tmp_path):
    layer, made = CASES[case]
    make, _ = LAYERS[layer]
    dense = Wrapped(make()).to(dtype)
    spec = find(dense)["layer"].spec
    model = compressed(dense, {"layer": made})
    path = tmp_path / "small.safetensors"
    save(model, plan_of({"layer": made}), path)
    header, size = header_of(path)
    assert size == size_bytes(specs_of(made, spec)) == size_in_bytes(model)
    masked = any(isinstance(m, Masked) for m in model.modules())
    assert header["__metadata__"]["format_version"] == ("2" if masked else "1")
    again = load(Wrapped(make()).to(dtype), path)
    assert same_weights(again, model)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]


def test_a_dense_network_and_a_low_rank_one_are_still_of_version_1(tmp_path):
    path = tmp_path / "small.safetensors"
    for model, choices in ((Wrapped(nn.Linear(6, 5)), {}), (Wrapped(nn.Linear(6, 5)), {"layer": low_rank(2)})):
        save(compressed(model, choices), plan_of(choices), path)
        header, _ = header_of(path)
        assert header["__metadata__"]["format_version"] == "1"
        assert "packed" not in header["__metadata__"]


def test_sparse_weights_stored_whole_can_be_read(tmp_path):
    made = choice(0, 0.2)
    model = compressed(Wrapped(nn.Linear(6, 5)), {"layer": made})
    path = tmp_path / "whole.safetensors"
    metadata = {"format": "spectrim", "format_version": "1", "plan": plan_of({"layer": made}).to_json()}
    save_file(dict(model.state_dict()), path, metadata)
    assert same_weights(load(Wrapped(nn.Linear(6, 5)), path), model)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(12, 12), nn.Linear(12, 8)
        self.b = self.a


@pytest.mark.parametrize("rank", [0, 2])
def test_a_layer_of_several_names_is_stored_once_and_stays_one(rank, tmp_path):
    choices = {"a": choice(rank, 0.25), "fc": choice(0, 0.1, "rows")}
    model = compressed(Twice(), choices)
    path = tmp_path / "twice.safetensors"
    save(model, plan_of(choices), path)
    assert header_of(path)[1] == size_in_bytes(model)
    again = load(Twice(), path)
    assert again.a is again.b
    assert same_weights(again, model)


def test_a_weight_that_another_module_owns_is_stored_whole(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.fc = nn.Linear(12, 8, bias=False), nn.Linear(12, 8)

    choices = {"fc": choice(0, 0.25)}
    model = compressed(Tied(), choices)
    model.early.weight = model.fc.layer.weight
    path = tmp_path / "tied.safetensors"
    save(model, plan_of(choices), path)
    again = load(Tied(), path)
    assert same_weights(again, model)


def test_loaded_values_are_cast_to_the_dtype_of_the_model(tmp_path):
    made = {"layer": choice(2, 0.25)}
    model = compressed(Wrapped(nn.Linear(12, 8)), made)
    path = tmp_path / "small.safetensors"
    save(model, plan_of(made), path)
    for dtype in (torch.float64, torch.bfloat16):
        again = load(Wrapped(nn.Linear(12, 8)).to(dtype), path)
        assert again.layer.sparse.layer.weight.dtype == dtype
        assert torch.equal(again.layer.sparse.layer.weight, model.layer.sparse.layer.weight.to(dtype))
        assert torch.equal(again.layer.sparse.mask, model.layer.sparse.mask)


def test_zeros_inside_the_mask_stay_inside_it(tmp_path):
    made = {"layer": choice(0, 0.25)}
    model = compressed(Wrapped(nn.Linear(12, 8)), made)
    with torch.no_grad():
        model.layer.layer.weight.zero_()
    path = tmp_path / "small.safetensors"
    save(model, plan_of(made), path)
    assert torch.equal(load(Wrapped(nn.Linear(12, 8)), path).layer.mask, model.layer.mask)


def test_a_mask_without_its_pattern_or_density_is_not_saved(tmp_path):
    path = tmp_path / "small.safetensors"
    for name, density, change, message in (
        ("2:4", 0.5, lambda m: m[0, :3].fill_(True), "from 2 to 3 of 4 units in a pool"),
        ("2x2", 0.25, lambda m: m.zero_()[0].fill_(True), "parts of the units of its pattern '2x2'"),
        ("unstructured", 0.25, lambda m: m.fill_(True), "keeps 96 units, and the plan's density of 0.25 24"),
    ):
        made = {"layer": choice(0, density, name)}
        model = compressed(Wrapped(nn.Linear(12, 8)), made)
        change(model.layer.mask)
        with pytest.raises(CheckpointError, match=message):
            save(model, plan_of(made), path)
        assert not path.exists()


# Damaged and hostile files.

PLANS = {
    "masked": ({"layer": choice(0, 0.25)}, lambda: nn.Linear(12, 8)),
    "nm": ({"layer": choice(0, 0.5, "2:4")}, lambda: nn.Linear(12, 8)),
    "coded": ({"layer": choice(0, 0.02)}, lambda: nn.Linear(40, 40)),
    "sum": ({"layer": choice(1, 0.25)}, lambda: nn.Conv2d(4, 6, 3)),
    "slim": ({"layer": choice(0, 0.5, "channels")}, lambda: nn.Conv2d(8, 12, 3, groups=2)),
}


def damaged(case: str, change: Any, path: Any) -> Any:
    """A model's file with tensors or metadata changed; what makes the dense model."""
    choices, layer = PLANS[case]
    save(compressed(Wrapped(layer()), choices), plan_of(choices), path)
    tensors, metadata = load_file(path), header_of(path)[0]["__metadata__"]
    # As of a file that was written before there were digests, which must be seen to by itself.
    metadata = {key: text for key, text in metadata.items() if not key.endswith("sha256")}
    change(tensors, metadata)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return lambda: Wrapped(layer())


def put(name: str, function: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors[name] = function(tensors[name])

    return change


def meta(name: str, value: str | None) -> Any:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata.pop(name)
        if value is not None:
            metadata[name] = value

    return change


def density_of(value: str) -> Any:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        plan = json.loads(metadata["plan"])
        plan["entries"][0]["choice"]["settings"]["density"] = json.loads(value)
        metadata["plan"] = json.dumps(plan)

    return change


def without(name: str) -> Any:
    return lambda tensors, metadata: tensors.pop(name)


V, M = "layer.layer.weight", "layer.mask"
BOTH = json.dumps([[V, M]])
FAULTS: dict[str, tuple[str, Any, str]] = {
    "values cut": ("masked", put(V, lambda t: t[:-1]), f"'{V}'.*expected floating-point values"),
    "values too many": ("masked", put(V, lambda t: torch.cat([t, t])), f"'{V}'"),
    "values of two axes": ("masked", put(V, lambda t: t.reshape(2, -1)), f"'{V}'"),
    "values whole": ("masked", put(V, lambda t: torch.zeros(8, 12)), f"'{V}'"),
    "values are integers": ("masked", put(V, lambda t: t.int()), f"'{V}'.*int32"),
    "values missing": ("masked", without(V), f"'{V}' is missing"),
    "positions missing": ("masked", without(M), f"'{M}' is missing"),
    "positions cut": ("masked", put(M, lambda t: t[:-1]), f"'{M}'.*11 bytes"),
    "positions empty": ("masked", put(M, lambda t: t[:0]), f"'{M}'"),
    "positions too long": ("masked", put(M, lambda t: torch.cat([t, t])), f"'{M}'"),
    "positions are numbers": ("masked", put(M, lambda t: t.float()), f"'{M}'.*float32"),
    "positions are a mask": ("masked", put(M, lambda t: torch.ones(8, 12, dtype=torch.bool)), f"'{M}'"),
    "all positions": ("masked", put(M, lambda t: torch.full_like(t, 255)), f"'{M}'.*24 different units out of 96"),
    "no positions": ("masked", put(M, torch.zeros_like), f"'{M}'.*24 different units"),
    "positions of another pattern": (
        "nm", put(M, lambda t: torch.tensor([0b0011_0111, 0b0011_0001] + [0b0011_0011] * 10, dtype=torch.uint8)),
        f"'{M}'.*from 1 to 3 of 4",
    ),
    "coded out of range": ("coded", put(M, lambda t: torch.full_like(t, 255)), f"'{M}'"),
    "coded twice": ("coded", put(M, lambda t: torch.cat([torch.zeros_like(t)[4:], t[-4:]])), f"'{M}'"),
    "kept more than there are": ("masked", density_of("1.5"), "site 'layer': density .* is 1.5"),
    "density below zero": ("masked", density_of("-0.5"), "site 'layer': density .* is -0.5"),
    "density as text": ("masked", density_of('"0.25"'), "site 'layer': density .* is '0.25'"),
    "density endless": ("masked", density_of("1e999"), "not a plan"),
    "another density": ("masked", density_of("0.3"), f"'{M}'"),
    "no table": ("masked", meta("packed", None), "table of packed tensors is missing"),
    "table no JSON": ("masked", meta("packed", "["), "table of packed"),
    "table deep": ("masked", meta("packed", "[" * 100_000), "table of packed"),
    "table of names": ("masked", meta("packed", json.dumps([V, M])), "pairs of names"),
    "table of numbers": ("masked", meta("packed", "[[1, 2]]"), "pairs of names"),
    "table an object": ("masked", meta("packed", "{}"), "pairs of names"),
    "table empty": ("masked", meta("packed", "[]"), f"'{M}' has shape"),
    "table of others": ("masked", meta("packed", '[["layer.layer.bias", "layer.mask"]]'), "not weight and mask"),
    "table twice": ("masked", meta("packed", json.dumps([[V, M], [V, M]])), "not weight and mask"),
    "called version 1": ("masked", meta("format_version", "1"), f"'{M}' has shape"),
    "version 4": ("masked", meta("format_version", "4"), "'4'"),
    "part of a sum": ("sum", put("layer.sparse.mask", lambda t: t[:-1]), "'layer.sparse.mask'"),
    "pattern that does not fit": (
        "masked", lambda t, m: m.update(plan=m["plan"].replace('"unstructured"', '"5x5"')), "'5x5' does not fit",
    ),
    "pattern unknown": (
        "masked", lambda t, m: m.update(plan=m["plan"].replace('"unstructured"', '"9999x"')), "unknown pattern",
    ),
    "channel out of range": ("slim", put("layer.channels", lambda t: t + 100), "'layer.channels'"),
    "channel below zero": ("slim", put("layer.channels", lambda t: t - 7), "'layer.channels'"),
    "channel twice": ("slim", put("layer.channels", lambda t: t[[0, 0, 2, 3]]), "'layer.channels'"),
    "channel of another group": ("slim", put("layer.channels", lambda t: torch.arange(4).int()), "'layer.channels'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_and_hostile_files_are_refused(fault, tmp_path):
    case, change, message = FAULTS[fault]
    path = tmp_path / "small.safetensors"
    make = damaged(case, change, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(make(), path)
    assert "small.safetensors" in str(caught.value)


def test_bytes_that_claim_a_large_layer_allocate_nothing(tmp_path):
    """What is allocated follows from the model that is loaded into, and its layer has another size than the file's."""
    path = tmp_path / "small.safetensors"
    damaged("masked", lambda tensors, metadata: None, path)
    with pytest.raises(CheckpointError, match="12 bytes of torch.uint8 cannot say which"):
        load(Wrapped(nn.Linear(400, 300)), path)
    assert read_plan(path)["layer"].choice == PLANS["masked"][0]["layer"]


def test_a_larger_layer_takes_few_bytes_more_than_its_values(tmp_path):
    made = {"layer": choice(0, 0.05)}
    model = compressed(Wrapped(nn.Linear(256, 512, bias=False)), made)
    path = tmp_path / "large.safetensors"
    save(model, plan_of(made), path)
    kept = round(0.05 * 256 * 512)
    assert header_of(path)[1] == 4 * kept + packed_bytes(256 * 512, kept)
    # An entry of 5 % carries log2 of 20 and 1.44 bits of information.
    assert packed_bytes(256 * 512, kept) < 1.1 * kept * (math.log2(20) + 1.44) / 8
    assert path.stat().st_size < 1.05 * header_of(path)[1]


def test_a_sum_keeps_its_parts_apart(tmp_path):
    made = {"layer": choice(2, 0.2)}
    model = compressed(Wrapped(nn.Conv2d(4, 6, 3)), made)
    path = tmp_path / "sum.safetensors"
    save(model, plan_of(made), path)
    again = load(Wrapped(nn.Conv2d(4, 6, 3)), path).eval()
    assert isinstance(again.layer, Summed)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(again(x), model.eval()(x))


PATTERNS = ("unstructured", "rows", "2:4", "2x2", "channels", "taps")


@pytest.mark.table(every=4)
@pytest.mark.parametrize("name", PATTERNS)
def test_what_apply_returns_takes_the_bytes_of_its_plan(name, tmp_path):
    model, batches = settled("residual"), batches_for("residual")
    method = LowRankPlusSparse(patterns=(name,), densities=(0.0, 0.2, 0.5), ranks=2, turns=4)
    sites = st.calibrate(model, st.find(model), batches)
    table = st.tabulate(sites, [method])
    plan = st.select(table, st.Budget(bytes=0.7))
    small = st.apply(model, sites, plan, batches)
    assert any(entry.choice.settings.get("density") for entry in plan)
    path = tmp_path / "small.safetensors"
    save(small, plan, path)
    assert header_of(path)[1] == plan.costs["bytes"] == size_in_bytes(small)
    assert plan.costs["bytes"] <= plan.budget["bytes"]
    again = load(settled("residual"), path)
    assert same_weights(again, small)
    x = batches[0]
    with torch.no_grad():
        assert torch.equal(again.eval()(x), small.eval()(x))
        assert close(merge(small)(x), small(x), 1e-4)
