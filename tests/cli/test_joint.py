"""Groups of layers that share factors, on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectrim.cli.steps import read_groups
from spectrim.selection.plan import Plan

SOURCE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Three alike convolutions, whose weights have most of their row space in common, between two that are not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 10)
        common = torch.randn(4, 24)
        for block in self.blocks:
            rows = torch.randn(24, 4) @ common + 0.1 * torch.randn(24, 24)
            weight = rows.view(3, 8, 3, 8).permute(3, 1, 0, 2)
            block.weight = nn.Parameter(0.05 * weight.contiguous())

    def forward(self, images):
        images = self.stem(images).relu()
        for block in self.blocks:
            images = images + block(images).relu()
        return self.head(images.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()
'''
DATA = ("--data", "nets:batches")
ALL = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture(autouse=True)
def _net(near) -> None:
    """A model with repeated layers in the folder that the program is called in."""
    Path("repeated.py").write_text(SOURCE)


def test_profile_lists_groups_with_their_layers_and_what_sharing_saves(run):
    found = run.json("profile", "repeated:net", *DATA, "--share")
    assert [layer["name"] for layer in found["layers"]] == ["stem", *ALL, "head"]
    assert found["costs"]["parameters"] == 80 + 3 * (9 * 64 + 8) + 90
    whole, half = found["groups"]
    assert (whole["name"], whole["members"]) == ("blocks.[0-2]", ALL)
    assert (half["name"], half["members"]) == ("blocks.[0-1]", ALL[:2])
    assert whole["costs"]["parameters"] == 3 * (9 * 64 + 8)
    # The layers have a row space in common, which is stored once.
    lost = whole["lost"]["25%"]
    assert lost["shared"] < 0.75 * lost["apart"]
    assert lost["choice"]["left_rank"] < lost["choice"]["rank"]


def test_profile_prints_groups_of_ones_own_and_says_if_there_are_none(run):
    Path("groups.json").write_text('{"wide": ["blocks.0", "blocks.1"]}')
    (only,) = run.json("profile", "repeated:net", "--groups", "groups.json")["groups"]
    assert only["members"] == ALL[:2]
    text = run("profile", "repeated:net", "--groups", "groups.json").stdout
    assert "wide: blocks.0, blocks.1" in text
    assert f"{only['lost']['25%']['shared']:.2%}" in text
    assert 0 < only["lost"]["50%"]["shared"] < only["lost"]["25%"]["shared"] < 1
    assert "groups" not in run.json("profile", "repeated:net")
    assert run.json("profile", "repeated:net", "--share", "--only", "head")["groups"] == []
    assert "no layers are alike enough" in run("profile", "repeated:net", "--share", "--only", "head").stdout


@pytest.mark.slow
def test_compress_shares_under_a_parameter_budget_and_says_so(run):
    found = run.json("compress", "repeated:net", *DATA, "--budget", "parameters=25%", "--out", "small")
    assert found["costs"]["parameters"] <= found["budget"]["parameters"]
    (group,) = [group for group in found["groups"] if set(group["members"]) <= set(ALL)]
    assert group["method"].startswith("JointSVD-")
    assert any(f"{len(group['members'])} layers share factors, in 1 group." in note for note in found["notes"])
    plan = Plan.read("small/plan.json")
    assert plan[group["name"]].members == tuple(group["members"])
    # Shared factors are counted once, in the plan, on the model and in the file.
    rows = {row["metric"]: row for row in found["comparison"]["rows"]}
    assert rows["parameters"]["compressed"] == plan.costs["parameters"]
    stored = load_file("small/model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == plan.costs["parameters"]
    page = Path("small/report.html").read_text(encoding="utf-8")
    assert all(member in page for member in group["members"])


def test_sharing_is_the_default_for_parameters_only_and_its_plan_can_be_carried_out_again(run):
    bare = ("compress", "repeated:net", "--input", "1x8x8", "--no-report")
    small = run.json(*bare, "-b", "parameters=25%", "-o", "small")
    off = run.json(*bare, "-b", "parameters=25%", "--no-share", "-o", "off")
    quick = run.json(*bare, "-b", "macs=50%", "-o", "quick")
    assert small["groups"] != []
    assert off["groups"] == quick["groups"] == []
    plan = Plan.read("small/plan.json")
    assert Plan.read("off/plan.json").loss > plan.loss

    run(*bare, "--plan", "small/plan.json", "--out", "again", "--quiet")
    stored, again = (load_file(f"{folder}/model.safetensors") for folder in ("small", "again"))
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[key], again[key]) for key in stored)
    measured = run.json("evaluate", "repeated:net", "-c", "again/model.safetensors", *DATA, "--repeats", "0")
    values = {row["metric"]: row["value"] for row in measured["rows"]}
    assert values["parameters"] == plan.costs["parameters"]


def test_joint_offers_every_way_to_share_within_groups_of_ones_own(run):
    Path("groups.json").write_text(json.dumps({"mine": ["blocks.1", "blocks.2"]}))
    options = ("--input", "1x8x8", "--method", "joint", "--groups", "groups.json", "--no-report")
    found = run.json("compress", "repeated:net", "-b", "parameters=30%", *options)
    (group,) = found["groups"]
    assert (group["name"], group["members"]) == ("mine", ALL[1:])
    assert Plan.read("compressed/plan.json")["blocks.2"].site == "mine"


def test_groups_are_read_in_order(tmp_path: Path):
    file = tmp_path / "groups.json"
    file.write_text('\ufeff{"b": ["x", "y"], "a": ["z", "w"]}', encoding="utf-8")  # as some editors begin a text
    assert list(read_groups(file).items()) == [("b", ("x", "y")), ("a", ("z", "w"))]


@pytest.mark.table
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["blocks.0", "blocks.9"]}', "'blocks.9', which the model does not have"),
        ('{"a": ["blocks.0", "stem"]}', "'stem', which is left alone: skipped on request"),
        ('{"a": ["blocks.0", "head"]}', "'head' (Linear, 8 -> 10)"),
        ('{"a": ["blocks.0"]}', "['blocks.0']"),
        ('{"a": ["blocks.0", "blocks.1"], "b": ["blocks.1", "blocks.2"]}', "'a' and 'b' overlap"),
        ('{"head": ["blocks.0", "blocks.1"]}', "'head' has the name of a site"),
        ('{"a": ["blocks.0", "blocks.1"], "a": []}', "'a' twice"),
        ('{"a": "blocks.0"}', 'is "blocks.0"; expected a list'),
        ('{"a": [1, 2]}', "is [1, 2]; expected a list"),
        ('["blocks.0", "blocks.1"]', 'holds ["blocks.0", "blocks.1"]; expected an object'),
        ('{"a": ["blocks.0"', "'groups.json' cannot be read as JSON"),
        ("\udcff", "'groups.json' cannot be read as JSON"),
        ('{"a\\ud800": ["blocks.0", "blocks.1"]}', "'groups.json' cannot be read as JSON"),
        (f'{{"a": ["{"b" * 2**20}"]}}', "'groups.json' cannot be read as JSON: it has more than 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("command", [("profile",), ("compress", "--budget", "parameters=50%")])
def test_a_file_of_groups_that_cannot_be_used_is_quoted(run, command: tuple[str, ...], text: str, message: str):
    Path("groups.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    name, *options = command
    result = run(
        name, "repeated:net", *options, *DATA, "--skip", "stem", "--groups", "groups.json", code=2
    )  # fmt: skip
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "parameters=50%", "--groups", "gone.json"), "'gone.json' cannot be read"),
        (("--budget", "parameters=50%", "--groups", "gone.json", "--no-share"), "--groups gone.json does not combine"),
        (("--budget", "parameters=50%", "--method", "joint", "--no-share"), "--method joint does not combine"),
        (("--plan", "plan.json", "--share"), "--share does not combine with --plan"),
        (("--plan", "plan.json", "--no-share"), "--no-share does not combine with --plan"),
    ],
)
def test_options_that_contradict_each_other(run, arguments: tuple[str, ...], message: str):
    Path("plan.json").write_text('{"entries": []}')
    assert message in run("compress", "repeated:net", *DATA, *arguments, code=2).stderr


@pytest.mark.slow
def test_the_document_stays_alone_when_c_code_prints():
    Path("loud.py").write_text(
        "import os\nfrom repeated import net as quiet\ndef net():\n    os.write(1, b'noise\\n')\n    return quiet()\n"
    )
    script = "from spectrim.cli.app import main; main()"
    call = [sys.executable, "-c", script, "profile", "loud:net", "--json"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["model"] == "loud:net"
    assert "noise" in done.stderr
