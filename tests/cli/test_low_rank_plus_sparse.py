"""Low rank plus sparse on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectrim.cli.methods import SPARSE as METHOD
from spectrim.cli.methods import Methods
from spectrim.cli.models import load_compressed
from spectrim.cli.steps import kernel_notes, kernel_values
from spectrim.methods import LowRankPlusSparse
from spectrim.nn.sparse.kernels import ChosenKernel, Kernel
from spectrim.nn.sparse.packed import masked_layers
from spectrim.selection.plan import Plan

DATA = ("--data", "nets:batches")
SPARSE = ("--method", METHOD)
BYTES = ("--budget", "bytes=65%")
# One layer, and one rank for each density: a table that is made in no time.
QUICK = (*DATA, "--method", f"{METHOD}:share=0.3", "--only", "wide", "--quiet")


@pytest.mark.slow
def test_compress_counts_the_positions_and_measures_what_it_counted(run):
    found = run.json("compress", "nets:tiny", *QUICK, *BYTES, "--out", "small")
    plan = Plan.read("small/plan.json")
    assert found["costs"]["bytes"] <= 0.65 * found["dense_costs"]["bytes"]
    sparse = [entry for entry in plan if entry.choice.settings.get("density")]
    assert sparse
    # Positions come on top of four bytes a number.
    assert plan.costs["bytes"] > 4 * plan.costs["parameters"]
    rows = {row["metric"]: row for row in found["comparison"]["rows"]}
    assert rows["parameters"]["compressed"] == plan.costs["parameters"]
    assert rows["MACs"]["compressed"] == plan.costs["macs"]
    assert {"file size", "latency p50"} <= rows.keys()
    # The file is not larger than the plan says, its header included, and its tensors are smaller by that.
    stored, file = load_file("small/model.safetensors"), Path("small/model.safetensors").stat().st_size
    assert sum(t.numel() * t.element_size() for t in stored.values()) < file <= plan.costs["bytes"] < file + 2048
    assert any(f"{len(sparse)} layer" in note and "sparse weight" in note for note in found["notes"])
    assert {each["layer"].removesuffix(".sparse") for each in found["kernels"]} == {entry.site for entry in sparse}
    page = Path("small/report.html").read_text(encoding="utf-8")
    assert "% unstructured" in page


@pytest.mark.slow
def test_what_was_compressed_can_be_evaluated_exported_and_carried_out_again(run):
    run("compress", "nets:tiny", *QUICK, *BYTES, "--out", "small", "--no-report")
    costs = Plan.read("small/plan.json").costs
    checkpoint = ("--checkpoint", "small/model.safetensors")
    measured = run.json("evaluate", "nets:tiny", *checkpoint, *DATA, "--repeats", "1")
    values = {row["metric"]: row["value"] for row in measured["rows"]}
    assert (values["parameters"], values["MACs"]) == (costs["parameters"], costs["macs"])
    assert measured["kernels"]
    assert all(set(each["milliseconds"]) >= {"dense"} for each in measured["kernels"])
    # Nothing is timed, and nothing chosen, without repeats.
    assert run.json("evaluate", "nets:tiny", *checkpoint, *DATA, "--repeats", "0")["kernels"] == []
    exported = run.json("export", "nets:tiny", *checkpoint, "--input", "1x8x8", "--out", "small.pt2")
    assert exported["difference"] < 1e-5

    run("compress", "nets:tiny", *QUICK, "--plan", "small/plan.json", "--out", "again", "--no-report")
    stored, again = (load_file(f"{folder}/model.safetensors") for folder in ("small", "again"))
    assert stored.keys() == again.keys()
    assert all(stored[key].shape == again[key].shape for key in stored)


@pytest.mark.slow
def test_training_keeps_the_support(run):
    call = ("compress", "nets:tiny", *QUICK, *BYTES, "--no-report")
    run(*call, "--out", "at-once")
    run(*call, "--train", "nets:batches", "--epochs", "1", "--out", "tuned")
    before, after = (load_compressed("nets:tiny", f"{folder}/model.safetensors") for folder in ("at-once", "tuned"))
    layers = list(zip(masked_layers(before), masked_layers(after), strict=True))
    assert layers
    for (name, _, old), (_, _, new) in layers:
        assert torch.equal(old.mask, new.mask)
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name))


def test_a_fixed_share_is_that_of_the_numbers_stored(run):
    bare = ("--input", "1x8x8", "--only", "wide", "--no-report", "--quiet")
    run("compress", "nets:tiny", "--method", f"{METHOD}:share=0.3", *bare, "-b", "bytes=60%")
    plan = Plan.read("compressed/plan.json")
    assert plan.unit == "weight energy"
    choice, costs = plan["wide"].choice, plan["wide"].costs
    assert choice.method == "LowRankPlusSparse"
    sparse = round(choice["density"] * 12 * 12 * 9)
    pair = costs["parameters"] - 12 - sparse
    # The rank is rounded down, to a whole number.
    assert 0 < pair <= 0.3 / 0.7 * sparse + 1
    assert pair / choice["rank"] > 0.3 / 0.7 * sparse - pair


def test_patterns_that_make_a_layer_smaller(run):
    bare = ("--input", "1x8x8", "--only", "wide", "--no-report", "--quiet")
    run("compress", "nets:tiny", "--method", f"{METHOD}:patterns=channels+taps,share=0", *bare, "-b", "macs=70%")
    choice = Plan.read("compressed/plan.json")["wide"].choice
    assert choice["rank"] == 0
    assert choice["pattern"].startswith(("channels", "taps"))
    assert not list(masked_layers(load_compressed("nets:tiny", "compressed/model.safetensors")))


def test_profile_says_what_stores_the_fewest_bytes(run):
    wide = ("profile", "nets:tiny", *DATA, "--only", "wide")
    found = run.json(*wide, "--method", f"{METHOD}:patterns=rows+2:4,share=0.2")
    for layer in found["layers"]:
        one, five = layer["smallest"]["1%"], layer["smallest"]["5%"]
        assert one["error"] <= 0.01
        assert five["error"] <= 0.05
        assert five["bytes"] <= one["bytes"] <= layer["costs"]["bytes"]
        assert five["left"] == five["bytes"] / layer["costs"]["bytes"]
    (layer,) = found["layers"]
    assert layer["smallest"]["5%"]["choice"]["pattern"] in {"rows", "2:4"}
    text = run(*wide, "--method", f"{METHOD}:share=0.3").stdout
    assert "Fewest stored bytes" in text
    assert "unstructured" in text
    assert "smallest" not in run.json(*wide)["layers"][0]


def test_the_method_stands_beside_low_rank_alone_unless_the_split_is_fixed():
    def names(calibrated: bool, *texts: str) -> list[str]:
        return [method.name for method in Methods.read(texts).chosen(calibrated, multiple_of=4)]

    assert names(True, METHOD) == ["ActivationSVD", "ActivationTucker2", "TiedSVD", "LowRankPlusSparse"]
    assert names(False, METHOD) == ["WeightSVD", "TiedSVD", "LowRankPlusSparse"]
    assert names(True, f"{METHOD}:share=0.25") == ["LowRankPlusSparse"]
    assert names(True, METHOD, "weight-svd") == ["LowRankPlusSparse", "WeightSVD"]
    (only,) = Methods.read([f"{METHOD}:patterns=2:4+taps,share=0.25"]).chosen(True, multiple_of=4)
    assert only == LowRankPlusSparse(patterns=("2:4", "taps"), share=0.25, multiple_of=4)


@pytest.mark.table
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", f"{METHOD}:patterns=2:x"), "unknown pattern '2:x'"),
        (("--method", f"{METHOD}:patterns=tap"), f"--method {METHOD}:patterns=tap: unknown pattern 'tap'"),
        (("--method", f"{METHOD}:patterns=5:4"), "'5:4'"),
        (
            ("--method", f"{METHOD}:patterns=2:7"),
            "pattern '2:7' fits no layer of the model (Conv2d 3x3, 1 -> 12;",
        ),
        (("--method", f"{METHOD}:patterns=taps", "--only", "head"), "pattern 'taps' fits no layer"),
        (("--method", f"{METHOD}:share=1.5"), f"--method {METHOD}:share=1.5: share is 1.5; expected a number from 0"),
    ],
)
@pytest.mark.parametrize("command", [("profile",), ("compress", *BYTES)], ids=["profile", "compress"])
def test_what_cannot_be_carried_out_is_quoted(run, command: tuple[str, ...], arguments: tuple[str, ...], message: str):
    name, *options = command
    result = run(name, "nets:tiny", *options, *DATA, *arguments, code=2)
    assert message in result.stderr
    assert result.stdout == ""


def test_what_is_said_of_kernels():
    slow = ChosenKernel("a", Kernel.DENSE, {Kernel.DENSE: 1.0, Kernel.CSR: 2.0})
    fast = ChosenKernel("b", Kernel.CSR, {Kernel.DENSE: 1.0, Kernel.CSR: 0.5})
    assert kernel_notes([]) == []
    assert "none is faster" in kernel_notes([slow])[0]
    assert "Of 2 layers with a sparse weight 1 skip" in kernel_notes([slow, fast])[0]
    assert kernel_values([fast]) == [{"layer": "b", "kernel": "csr", "milliseconds": {"dense": 1.0, "csr": 0.5}}]
